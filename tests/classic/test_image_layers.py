"""Images that begin alike share layers, what is in use stays, and what nothing stands on leaves first."""

import random

import pytest

from minilib.classic.image_layers import DiskFull, ImageLayers
from minilib.mechanisms.caching import Fifo, Lru
from minilib.mechanisms.content_addressing import HashChain, RadixTree

DESIGNS = pytest.mark.parametrize("design", [HashChain, RadixTree])


def layers(text):
    return [letter.encode() for letter in text]


@DESIGNS
def test_an_image_fetches_what_no_other_image_begins_with(design):
    disk = ImageLayers(20, Lru(), design)
    assert [disk.pull(name, layers(name)) for name in ("abc", "abcd", "abce", "xbc", "ab")] == [3, 1, 1, 3, 0]
    assert disk.fetched == 8 and disk.images["abcd"][:3] == disk.images["abc"] != disk.images["xbc"]
    disk.check_invariants()


@DESIGNS
def test_layers_stay_until_their_room_is_needed_and_the_top_leaves_first(design):
    disk = ImageLayers(4, Fifo(), design)
    disk.pull("abcd", layers("abcd"))
    with pytest.raises(DiskFull, match="lacks 2 layers, and there is room for 0"):
        disk.pull("x", layers("xy"))
    disk.check_invariants()
    disk.remove("abcd")
    assert disk.pull("x", layers("x")) == 1
    assert disk.pull("again", layers("abc")) == 0 and disk.pull("abcd", layers("abc")) == 0
    with pytest.raises(ValueError, match="'x' is there already"):
        disk.pull("x", layers("x"))
    with pytest.raises(KeyError):
        disk.remove("nobody's")
    disk.remove("x")
    disk.check_invariants()


@DESIGNS
def test_any_order_of_operations(design):
    choices, capacity, texts, full = random.Random(4), 9, {}, 0
    disk = ImageLayers(capacity, Lru(), design)
    for number in range(600):
        text = "".join(choices.choice("ab") for _ in range(choices.randrange(6)))
        needed = {text[:depth] for depth in range(1, len(text) + 1)}
        in_use = {one[:depth] for one in texts.values() for depth in range(1, len(one) + 1)}
        there = {b"".join(path[1:]).decode() for path in disk.index.paths()}
        assert in_use <= there and len(there) <= capacity
        name = choices.choice(["pull", "pull", "pull", "remove", "remove", "pull"])
        if name == "pull" and len(in_use | needed) > capacity:
            full += 1
            with pytest.raises(DiskFull):
                disk.pull(str(number), layers(text))
        elif name == "pull":
            assert disk.pull(str(number), layers(text)) == len(needed - there)
            texts[str(number)] = text
        elif name == "remove" and texts:
            image = choices.choice(list(texts))
            disk.remove(image)
            del texts[image]
        disk.check_invariants()
    assert full > 20 and disk.index.evictions > 10
