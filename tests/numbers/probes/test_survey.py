import json
from types import SimpleNamespace

import pytest

from minilib.numbers.machine import Machine
from minilib.numbers.probes import chase, survey


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A survey of three instant questions, in a cache of its own; yields the list of questions asked."""
    asked = []

    def ask(name, answer):
        def question():
            asked.append(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return question

    questions = {
        "memory": ask("memory", {"memory_bandwidth": 1e10, "bandwidths": {"memory_read": 2e10}}),
        "flops": ask("flops", {"flops": {"fp32": 1e11}}),
        "chain": ask("chain", chase.UnsupportedProbe("not here")),
        "disk": ask("disk", {"bandwidths": {"disk_read": 1e9}}),
    }
    monkeypatch.setattr(survey, "_CPU_QUESTIONS", questions)
    monkeypatch.setattr(survey, "_QUICK_QUESTIONS", {"cpu": lambda: {"memory_bandwidth": 1e10, "fp32": 1e11}})
    beside(monkeypatch, 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def beside(monkeypatch, share):
    """Have others take a share of the cores."""
    monkeypatch.setattr(survey, "Watch", lambda: SimpleNamespace(busy=share))


def test_answers_are_merged_and_a_question_without_answer_leaves_a_gap(quick):
    machine = Machine.measure("cpu", progress=False)
    assert machine.bandwidths == {"memory_read": 2e10, "disk_read": 1e9}
    assert machine.random_access == ()


def test_a_machine_is_measured_once(quick):
    first = Machine.measure("cpu", progress=False)
    assert Machine.measure("cpu", progress=False) == first
    assert quick == ["memory", "flops", "chain", "disk"]
    Machine.measure("cpu", progress=False, refresh=True)
    assert len(quick) == 8


def test_a_machine_measured_beside_others_says_so_and_is_measured_anew(quick, monkeypatch):
    beside(monkeypatch, 0.4)
    machine = Machine.measure("cpu", progress=False)
    assert machine.busy == 0.4
    assert "others took: 40% of the cores" in " ".join(": ".join(row) for row in machine.table().rows)
    beside(monkeypatch, 0.0)
    machine = Machine.measure("cpu", progress=False)
    assert len(quick) == 8 and machine.busy == 0.0
    assert "others took" not in str(machine)
    Machine.measure("cpu", progress=False)
    assert len(quick) == 8


def test_a_refresh_beside_others_does_not_replace_what_is_remembered(quick, monkeypatch):
    remembered = Machine.measure("cpu", progress=False)
    beside(monkeypatch, 0.4)
    assert Machine.measure("cpu", progress=False, refresh=True).busy == 0.4
    assert Machine.measure("cpu", progress=False) == remembered


@pytest.mark.parametrize("figure", ["memory_bandwidth", "fp32"])
@pytest.mark.parametrize(("factor", "anew"), [(1.0, False), (1.4, False), (1.6, True), (0.7, False), (0.6, True)])
def test_a_remembered_machine_is_checked_before_it_is_used(figure, factor, anew, quick, monkeypatch):
    Machine.measure("cpu", progress=False)
    now = {"memory_bandwidth": 1e10, "fp32": 1e11}
    now[figure] *= factor
    monkeypatch.setattr(survey, "_QUICK_QUESTIONS", {"cpu": lambda: now})
    Machine.measure("cpu", progress=False)
    assert len(quick) == (8 if anew else 4)


def test_a_check_beside_others_says_nothing(quick, monkeypatch):
    Machine.measure("cpu", progress=False)
    beside(monkeypatch, 0.4)
    monkeypatch.setattr(survey, "_QUICK_QUESTIONS", {"cpu": lambda: {"memory_bandwidth": 1e9, "fp32": 1e10}})
    Machine.measure("cpu", progress=False)
    assert len(quick) == 4


def test_the_quick_questions_ask_for_figures_that_a_survey_has():
    assert set(survey._QUICK_QUESTIONS["cpu"]()) == {"memory_bandwidth", "fp32"}


def test_other_library_versions_measure_again(quick, monkeypatch):
    Machine.measure("cpu", progress=False)
    monkeypatch.setattr(survey.records, "library_versions", lambda: {"torch": "99"})
    Machine.measure("cpu", progress=False)
    assert len(quick) == 8


def test_a_cache_that_cannot_be_read_is_measured_anew(quick):
    machine = Machine.measure("cpu", progress=False)
    survey._cache_path("cpu").write_text('{"half": ')
    assert Machine.measure("cpu", progress=False) == machine
    assert json.loads(survey._cache_path("cpu").read_text())["kind"] == "cpu"


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU"):
        Machine.measure("cuda")


CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: {name}
flags\t\t: fpu vme
power management:

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("AMD EPYC", "AMD EPYC family 25 model 1"),  # what a virtual machine says of three generations
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "Intel Xeon Platinum 8481C"),
        ("Intel(R) Xeon(R) Processor", "Intel Xeon family 25 model 1"),
    ],
)
def test_a_processor_is_called_what_tells_it_from_others(name, title):
    assert survey.cpu_title(CPUINFO.format(name=name)) == title


def test_a_processor_that_linux_does_not_describe_has_a_name_all_the_same():
    assert survey.cpu_title("") == survey.cpu_title("BogoMIPS\t: 50.00\n") != ""
