import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilib.numbers.machine import Link, Machine, NotOnThisMachine
from minilib.numbers.price import BOUNDS, Cost, price

MACHINE = Machine(
    name="toy",
    title="Toy",
    kind="cpu",
    origin="measured",
    flops={"fp32": 100.0, "bf16": 400.0},
    memory_bandwidth=10.0,
    memory_bytes=1000,
    call_overhead=0.5,
    links={"wire": Link(bandwidth=2.0, latency=0.25)},
)
ASYNC = Machine(**{**MACHINE.__dict__, "asynchronous": True, "kind": "gpu"})
counts = st.floats(min_value=0, max_value=1e18, allow_nan=False)


def test_each_term_is_its_count_over_its_rate():
    prediction = price(Cost(flops=200, bytes=40, messages=3, message_bytes=10, calls=4), MACHINE)
    assert prediction.terms == {"compute": 2.0, "memory": 4.0, "communication": 3 * 0.25 + 5.0, "overhead": 2.0}
    assert prediction.bound == "communication"


def test_overhead_adds_where_calls_are_synchronous_and_hides_where_they_are_not():
    cost = Cost(bytes=40, calls=4)
    assert price(cost, MACHINE).seconds == 4.0 + 2.0
    assert price(cost, ASYNC).seconds == 4.0
    assert price(Cost(calls=4), ASYNC).seconds == 2.0


@pytest.mark.parametrize(
    ("cost", "bound"),
    [
        (Cost(flops=1000, bytes=1), "compute"),
        (Cost(flops=1, bytes=100), "memory"),
        (Cost(bytes=1, message_bytes=100), "communication"),
        (Cost(flops=1, bytes=1, calls=1), "overhead"),
    ],
)
def test_bound_is_the_busiest_resource(cost, bound):
    assert price(cost, MACHINE).bound == bound


def test_a_dtype_is_priced_at_its_own_rate():
    assert price(Cost(flops=400, dtype="bf16"), MACHINE).terms["compute"] == 1.0
    with pytest.raises(NotOnThisMachine, match="fp8.*it has: fp32, bf16"):
        price(Cost(flops=1, dtype="fp8"), MACHINE)


def test_at_the_ridge_compute_and_memory_take_equally_long():
    prediction = price(Cost(flops=MACHINE.ridge("fp32") * 7, bytes=7), MACHINE)
    assert prediction.terms["compute"] == pytest.approx(prediction.terms["memory"])


def test_messages_need_a_link():
    linkless = Machine(**{**MACHINE.__dict__, "links": {}})
    with pytest.raises(NotOnThisMachine, match="it has none"):
        price(Cost(messages=1), linkless)
    with pytest.raises(NotOnThisMachine, match="no link 'nvlink'.*wire"):
        price(Cost(messages=1), MACHINE, link="nvlink")
    assert price(Cost(flops=1), linkless).seconds > 0  # without messages no link is looked for


@given(counts, counts, counts, counts, counts, st.integers(min_value=0, max_value=1000))
def test_a_cost_times_k_is_k_costs_added(flops, bytes_, messages, message_bytes, calls, k):
    cost = Cost(flops, bytes_, messages, message_bytes, calls)
    scaled = k * cost
    assert scaled == cost * k
    assert scaled.flops == pytest.approx(sum([cost.flops] * k))
    assert (cost + Cost()) == cost == (Cost() + cost)


@given(counts, counts, counts)
def test_more_work_never_takes_less_time(flops, nbytes, more):
    assert price(Cost(flops + more, nbytes), MACHINE).seconds >= price(Cost(flops, nbytes), MACHINE).seconds


@given(counts, counts)
def test_fused_costs_no_more_than_one_after_the_other(flops, nbytes):
    a, b = Cost(flops=flops), Cost(bytes=nbytes)
    assert price(a + b, MACHINE).seconds <= (price(a, MACHINE) + price(b, MACHINE)).seconds


def test_flops_of_two_dtypes_cannot_be_added():
    with pytest.raises(ValueError, match="fp32 to FLOPs in bf16"):
        Cost(flops=1) + Cost(flops=1, dtype="bf16")
    mixed = Cost(bytes=3) + Cost(flops=1, dtype="bf16")
    assert mixed == Cost(flops=1, bytes=3, dtype="bf16")


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_a_count_is_a_number_that_is_not_negative(bad):
    with pytest.raises(ValueError, match="bytes counts work"):
        Cost(bytes=bad)
    with pytest.raises(ValueError, match="counts work"):
        Cost(bytes=1) * bad


def test_predictions_on_different_machines_do_not_add():
    with pytest.raises(ValueError, match="cannot add a price on Toy"):
        price(Cost(flops=1), MACHINE) + price(Cost(flops=1), ASYNC)


def test_intensity_and_text():
    assert Cost(flops=8, bytes=2).intensity == 4
    assert Cost(flops=8).intensity == math.inf
    text = str(price(Cost(bytes=10, calls=0), MACHINE))
    assert text == "1.00 s on Toy, memory-bound"
    assert [row[0] for row in price(Cost(bytes=10), MACHINE).table().rows] == [*BOUNDS, "predicted"]
