import json

import pytest

from minilib.numbers import records
from minilib.numbers.machine import Link, Machine, NotOnThisMachine, UnknownMachine

LIVE = Machine(
    name="toy",
    title="Toy",
    kind="cpu",
    origin="measured",
    flops={"fp32": 1e11, "int8": 1e12},
    memory_bandwidth=2e10,
    memory_bytes=2**34,
    call_overhead=1e-6,
    links={"loopback": Link(2e9, 3e-5)},
    random_access=((4096, 1e-9), (2**20, 5e-9), (2**28, 1.5e-7)),
    caches={"L1": 49152},
    seconds={"process_start": 0.01},
    bandwidths={"disk_read": 1e9},
)


def test_a_machine_survives_json():
    assert Machine.from_dict(json.loads(json.dumps(LIVE.to_dict()))) == LIVE


def test_a_recorded_machine_loads_as_it_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    records.stamp("machine", LIVE.to_dict(), LIVE.title).save("toy", root=tmp_path)
    assert Machine.from_dict(records.load("toy", "machine", root=tmp_path).data) == LIVE


def test_load_latency_is_that_of_the_next_larger_probe():
    assert LIVE.load_latency(1) == 1e-9
    assert LIVE.load_latency(4096) == 1e-9
    assert LIVE.load_latency(4097) == 5e-9
    assert LIVE.load_latency(2**40) == 1.5e-7  # nothing larger was probed
    with pytest.raises(NotOnThisMachine, match="no measured random access"):
        Machine.datasheet("h100-sxm").load_latency(1)


def test_unknown_names_say_what_there_is():
    with pytest.raises(UnknownMachine, match="h100-sxm"):
        Machine.datasheet("h1000")
    with pytest.raises(records.RecordNotFound, match="no record nowhere/machine"):
        Machine.load("nowhere")
    with pytest.raises(NotOnThisMachine, match="it has: fp32, int8"):
        LIVE.peak("fp4")
    with pytest.raises(NotOnThisMachine, match="has no link 'nvlink'; it has: loopback"):
        LIVE.link("nvlink")


def test_the_only_link_needs_no_name_but_two_do():
    assert LIVE.link().bandwidth == 2e9
    with pytest.raises(NotOnThisMachine, match="say which link"):
        Machine.datasheet("h100-sxm").link()


@pytest.mark.parametrize("name", Machine.datasheets())
def test_every_data_sheet_can_be_priced_on(name):
    machine = Machine.datasheet(name)
    assert machine.origin == "datasheet"
    assert machine.call_overhead == 0.0
    assert machine.asynchronous == (machine.kind == "gpu")
    assert machine.ridge("bf16" if "bf16" in machine.flops else "fp32") > 1
    assert str(machine) and machine._repr_html_()


def test_a_machine_needs_its_three_numbers():
    for broken in ({"kind": "tpu"}, {"memory_bandwidth": 0}, {"flops": {}}):
        with pytest.raises(ValueError):
            Machine(**{**LIVE.__dict__, **broken})


def test_device_must_be_known():
    with pytest.raises(ValueError, match="'auto', 'cpu' or 'cuda'"):
        Machine.measure("tpu")
