import json

import pytest

from minilib.numbers import records
from minilib.numbers.records import ProvenanceError, Record, RecordNotFound

WHERE = {
    "machine": "Toy",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "command": "python x",
    "versions": {"a": "1"},
}


def test_a_stamped_record_says_where_it_came_from():
    record = records.stamp("bandwidth", {"copy": 1.0}, "Toy")
    assert all(record.provenance[key] for key in records.REQUIRED)
    assert record.provenance["versions"]["torch"]
    assert "/" not in record.provenance["command"].split()[1]  # no path of this machine


@pytest.mark.parametrize("lost", records.REQUIRED)
def test_a_record_without_provenance_is_refused(lost, tmp_path):
    with pytest.raises(ProvenanceError, match=lost):
        Record("x", {}, {**WHERE, lost: ""})
    kept = {key: value for key, value in WHERE.items() if key != lost}
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "x.json").write_text(json.dumps({"name": "x", "data": {}, "provenance": kept}))
    with pytest.raises(ProvenanceError, match=lost):
        records.load("toy", "x", root=tmp_path)


def test_every_record_in_the_repository_has_provenance():
    for path in records.RESULTS.glob("*/*.json"):
        record = records.load(path.parent.name, path.stem)
        assert record.name == path.stem


def test_live_figures_stand_beside_every_recorded_machine(tmp_path):
    Record("x", {"copy": 1}, WHERE).save("one", root=tmp_path)
    Record("x", {"copy": 2}, {**WHERE, "machine": "Other"}).save("two", root=tmp_path)
    columns = records.beside("x", live={"copy": 3}, root=tmp_path)
    assert columns == {
        "this machine, live": {"copy": 3},
        "Toy, 2026-01-02": {"copy": 1},
        "Other, 2026-01-02": {"copy": 2},
    }
    assert records.machines("x", root=tmp_path) == ["one", "two"]


def test_saving_again_replaces_and_leaves_nothing_half_written(tmp_path):
    Record("x", {"copy": 1}, WHERE).save("one", root=tmp_path)
    path = Record("x", {"copy": 2}, WHERE).save("one", root=tmp_path)
    assert records.load("one", "x", root=tmp_path).data == {"copy": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_missing_record_names_those_there_are(tmp_path):
    Record("x", {}, WHERE).save("one", root=tmp_path)
    with pytest.raises(RecordNotFound, match="recorded so far: one/x"):
        records.load("two", "x", root=tmp_path)


@pytest.mark.parametrize("name", ["../up", "Upper", "", "a/b"])
def test_names_cannot_leave_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match="lower-case"):
        Record(name, {}, WHERE)
    with pytest.raises(ValueError, match="lower-case"):
        Record("x", {}, WHERE).save(name, root=tmp_path)
