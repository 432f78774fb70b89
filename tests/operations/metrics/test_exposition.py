"""Metrics over HTTP and as a file, as Prometheus and node_exporter find them."""

import json
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minilib.operations.metrics.exposition import MetricsEndpoint, write_textfile
from minilib.operations.metrics.rank_metrics import RankMetrics
from minilib.ranks.launch import run

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def scraped(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_a_scrape_without_accept_gets_text_0_0_4():
    with MetricsEndpoint(RankMetrics("tiny")) as endpoint:
        kind, text = scraped(endpoint.url)
        assert kind.startswith("text/plain; version=0.0.4") and 'training_running{rank="0",run="tiny"} 1.0' in text
        kind, text = scraped(endpoint.url, Accept=OPEN_METRICS)
        assert kind.startswith(OPEN_METRICS) and text.endswith("# EOF\n")
        assert endpoint.url == f"http://127.0.0.1:{endpoint.port}/metrics"


def test_nobody_answers_after_the_end():
    with MetricsEndpoint(RankMetrics("tiny")) as endpoint:
        pass
    with pytest.raises(OSError, match="refused"):
        scraped(endpoint.url)


def test_two_jobs_in_one_process_do_not_mix():
    one, two = RankMetrics("one"), RankMetrics("two")
    with MetricsEndpoint(one) as first, MetricsEndpoint(two) as second:
        assert first.port != second.port
        assert 'run="two"' not in scraped(first.url)[1] and 'run="one"' not in scraped(second.url)[1]


def test_the_target_of_a_rank_is_the_same_after_a_restart_on_another_port(tmp_path):
    found = []
    for restarts in range(2):
        endpoint = MetricsEndpoint(RankMetrics("tiny", 1, 2, restarts=restarts), tmp_path)
        (path,) = tmp_path.iterdir()
        found.append((endpoint.port, path.name, json.loads(path.read_text())))
        endpoint.close(ended_well=False)
        assert path.exists(), "a rank that failed is still a target, so that it is seen to be down"
    for port, name, content in found:
        assert name == "tiny-1.json"
        assert content == [{"targets": [f"127.0.0.1:{port}"], "labels": {"instance": "tiny/1"}}]


def test_the_target_of_a_job_that_ended_well_is_taken_back(tmp_path):
    with MetricsEndpoint(RankMetrics("tiny"), tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), MetricsEndpoint(RankMetrics("tiny"), tmp_path):
        raise RuntimeError
    assert len(list(tmp_path.iterdir())) == 1


def of_a_rank(folder):
    import torch.distributed as dist

    rank = dist.get_rank()
    metrics = RankMetrics("tiny", rank, 2)
    metrics.step_ended(1, 0.5, 10.0 + rank, 2.0, 1.0, 0.1)
    with MetricsEndpoint(metrics, Path(folder)) as endpoint:
        text = scraped(endpoint.url)[1]
        dist.barrier()
        seen = len(list(Path(folder).iterdir()))
        dist.barrier()
    return text, seen


def test_each_rank_serves_its_own(tmp_path):
    for rank, (text, seen) in enumerate(run(of_a_rank, 2, str(tmp_path), timeout=240)):
        assert f'training_tokens_total{{rank="{rank}",run="tiny"}} {10.0 + rank}' in text
        assert f'rank="{1 - rank}"' not in text and seen == 2


def test_a_text_file_is_written_whole(tmp_path, monkeypatch):
    path, metrics = tmp_path / "tiny-0.prom", RankMetrics("tiny")
    write_textfile(metrics, path)
    before = path.read_text()
    assert before.endswith("\n") and "training_running" in before and list(text_string_to_metric_families(before))
    seen = []
    written = Path.write_bytes

    def half(partial, content):
        written(partial, content[:100])
        seen.append((partial.suffix, path.read_text()))
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space"):
        write_textfile(metrics, path)
    assert seen == [(".partial", before)] and path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_a_name_that_node_exporter_leaves_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.prom, got 'tiny\.txt'"):
        write_textfile(RankMetrics("tiny"), tmp_path / "tiny.txt")


def test_an_endpoint_that_cannot_tell_its_address_does_not_listen(tmp_path):
    before = threading.active_count()
    with pytest.raises(FileNotFoundError):
        MetricsEndpoint(RankMetrics("tiny"), tmp_path / "missing")
    assert threading.active_count() == before


@pytest.mark.parametrize("run", ["team/tiny", "../tiny", 'a "b"\n\\c', "é·模型"])
def test_any_name_of_a_run_is_told_and_scraped(tmp_path, run):
    with MetricsEndpoint(RankMetrics(run), tmp_path) as endpoint:
        (target,) = tmp_path.glob("*.json")
        assert json.loads(target.read_text())[0]["labels"] == {"instance": f"{run}/0"}
        _, text = scraped(endpoint.url)
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert families["training_running"].samples[0].labels["run"] == run
    assert not [*tmp_path.iterdir()]
