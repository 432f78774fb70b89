"""Container images: each is a chain of layers, and images that begin alike share the layers they begin with.

    python:3.12    [ debian │ libraries │ python ]
    web:7          [ debian │ libraries │ python │ web 7 ]        one layer is fetched, three are there
    web:8          [ debian │ libraries │ python │ web 8 ]

A layer is a difference from the layers below it, so it means something behind those alone, and its name is that of its
whole past. A layer that no image uses stays until there is no room for a new one; then those leave first that nothing
stands on. The same index finds pages of keys and values (serving/cache/prefix.py).

Source: OCI Image Format Specification, "Layer ChainID".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minilib.mechanisms.caching import EvictionPolicy
from minilib.mechanisms.content_addressing import HashChain, PrefixIndex


class DiskFull(MemoryError):
    """The images that are in use leave no room for another layer; nothing was changed."""


class ImageLayers:
    """The layers on one host's disk.

    Args:
        capacity: most layers at a time.
        policy: chooses the layer that leaves.
        design: finds layers: a `HashChain`, or a `RadixTree`.

    Attributes:
        images: number of the place of each layer, from the lowest on, of every image in use.
        fetched: layers that were not there when an image was pulled.

    Raises:
        ValueError: if capacity is below 0.
    """

    def __init__(self, capacity: int, policy: EvictionPolicy, design: type[PrefixIndex] = HashChain) -> None:
        if capacity < 0:
            raise ValueError(f"a disk holds 0 layers or more, got {capacity!r}")
        self.index, self.images, self.fetched = design(policy), {}, 0
        self._free = list(range(capacity - 1, -1, -1))
        self._users: Counter[int] = Counter()

    def pull(self, image: str, layers: Sequence[bytes]) -> int:
        """Make an image ready to run.

        Args:
            image: its name.
            layers: the digest of each layer, the lowest first.

        Returns:
            How many of them had to be fetched.

        Raises:
            ValueError: if an image of this name is there.
            DiskFull: if there is no room.
        """
        if image in self.images:
            raise ValueError(f"image {image!r} is there already; remove it before another one takes its name")
        found = self.index.match(layers)
        places = found.values
        self._users.update(places)
        missing = layers[len(places) :]
        unused = sum(not self._users[place] for place in self.index)
        if len(missing) > len(self._free) + unused:
            self._users.subtract(places)
            raise DiskFull(f"{image!r} lacks {len(missing)} layers, and there is room for {len(self._free) + unused}")
        self.index.use(found.position)
        position = found.position
        for layer in missing:
            position = self.index.add(position, layer, self._place())
            places.append(position.value)
            self._users[position.value] += 1
        self.images[image] = places
        self.fetched += len(missing)
        return len(missing)

    def remove(self, image: str) -> None:
        """Take an image out of use; its layers stay as long as there is room.

        Raises:
            KeyError: if there is no such image.
        """
        self._users.subtract(self.images.pop(image))

    def check_invariants(self) -> None:
        """Each place is free or holds a layer, and a layer counts as many users as images have it."""
        self.index.check_invariants()
        assert not set(self._free) & set(self.index), "a layer's place is free"
        assert +self._users == Counter(place for places in self.images.values() for place in places), "users miscounted"

    def _place(self) -> int:
        return self._free.pop() if self._free else self.index.evict(self._users.__getitem__)
