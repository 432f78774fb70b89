"""Page faults are counted, so they are exact: none is the interpreter's own."""

import sys

import pytest

from minilib.numbers.probes import faults

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems count page faults differently")


@pytest.mark.parametrize("touched", [0, 1, 100, 4095, 4096])
def test_demand_paging_takes_a_fault_for_each_page_that_is_touched(touched):
    assert faults.demand_paging(4096, touched) == touched


def test_more_pages_than_there_are_cannot_be_touched():
    with pytest.raises(ValueError, match="between 0 and 8 of 8 pages can be written, got 9"):
        faults.demand_paging(8, 9)
