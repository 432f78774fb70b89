"""A script without `if __name__ == "__main__"`: its ranks must not run it again. Prints one line."""

from minilib.ranks import launch


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


def make(x: int) -> Point:
    import torch.distributed as dist

    return Point(x + dist.get_rank())


points = launch.run(make, 2, 40)
print([point.x for point in points if isinstance(point, Point)])
