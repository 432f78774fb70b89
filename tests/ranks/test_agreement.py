"""What ranks say to each other as texts, those who have nothing to say included."""

import pytest
import torch.distributed as dist

from minilib.ranks.agreement import gather_texts
from minilib.ranks.collectives import Communicator
from minilib.ranks.launch import run
from minilib.ranks.transport.shared import SharedMemoryTransport


def say(texts: list[str]) -> list[str]:
    return gather_texts(texts[dist.get_rank()], Communicator(SharedMemoryTransport()))


@pytest.mark.parametrize("texts", [["", ""], ["", "é is two bytes"], ["a\nb", ""], ["same", "same"]])
def test_every_rank_hears_what_all_say(texts):
    assert run(say, 2, texts, timeout=60) == [texts, texts]
