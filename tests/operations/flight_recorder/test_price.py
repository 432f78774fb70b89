"""The price of a recording: bytes exactly, and nanoseconds that are not nothing."""

import pytest

from minilib.operations.flight_recorder.price import recording_price
from minilib.operations.flight_recorder.recorder import NAME_BYTES, NUM_NAMES


def test_a_ring_of_2000_calls_takes_as_many_bytes_as_it_says():
    price = recording_price(2000, calls=50, batches=3)
    assert price.bytes == 8 + 3 * 8 + (32 + 6 * 8) + 8  # sequence, marks, fields and dims, checksum
    assert price.total_bytes == 64 + NUM_NAMES * (8 + 8 + NAME_BYTES + 8) + 2000 * price.bytes < 2**19
    assert price.ns > 0


def test_a_price_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 of 5"):
        recording_price(calls=5, batches=0)
