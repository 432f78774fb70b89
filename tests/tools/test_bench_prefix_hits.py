"""The bench of chapter 14: every figure is there, and counts are those of the closed forms."""

import statistics

from minilib.mechanisms.caching import Lru
from minilib.mechanisms.content_addressing import HashChain, RadixTree
from minilib.model.config import ModelConfig
from tools.bench import prefix_hits, prefix_index

SMALL = ModelConfig(97, 32, 48, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, max_position=256)


def test_every_figure_that_needs_a_model_is_there():
    found = prefix_hits.prefix_hits(SMALL, SMALL, cached=(32,), loads={"tiny": (2, 20, 3)}, turns=1)
    assert found["parameters"] == found["no_hits_parameters"] == SMALL.num_parameters
    rows = {(row["design"], row["tail"]): row for row in found["hits"]}
    assert set(rows) == {(design, tail) for design in ("hash", "radix") for tail in (16, 64)}
    for row in rows.values():
        assert [row[name]["samples"] for name in ("whole", "hit", "again", "whole_over_hit")] == [1, 3, 1, 3]
        low, high = row["hit"]["quartiles"]
        assert 0 < low <= row["hit"]["median"] <= high and row["whole_over_hit"]["median"] > 0
    memory, file = found["tiers"]
    assert (memory["where"], file["where"]) == ("memory", "file")
    for row in (memory, file):
        assert row["page_bytes"] == 2 * 16 * 16 * 4  # keys and values, tokens, width, fp32
        middle = {name: row[name]["median"] for name in ("whole", "back", "there")}
        assert row["back_seconds_per_page"] == (middle["back"] - middle["there"]) / 2
        assert row["computed_seconds_per_page"] == (middle["whole"] - middle["there"]) / 2
    assert [row["design"] for row in found["no_hits"]] == ["none", "hash", "radix"]
    for row in found["no_hits"]:  # two requests take all four pages, and of the two kept ones the next turn has need
        assert row["evictions"] == (4 * 2 if row["design"] != "none" else 0)
        assert row["load"] == "tiny" and row["over_none"]["samples"] == row["seconds"]["samples"] == 4
        assert row["over_none"]["median"] > 0 and row["added_share"] * row["added_seconds"]["median"] >= 0


def test_lookups_of_chains_and_forks():
    rows = {(row["design"], row["shape"]): row for row in prefix_index.lookups((64,), forks=32, budget=0.001)}
    assert {shape: row["pages"] for (_, shape), row in rows.items()} == {"chain": 64, "forks": 16 + 32 * 4}
    assert all(row["match_seconds"] > 0 and row["keep_seconds"] > 0 for row in rows.values())
    for shape in ("chain", "forks"):
        assert rows["hash", shape]["index_bytes"] > rows["radix", shape]["index_bytes"] > 0
        assert min(rows[design, shape]["token_bytes"] for design in ("hash", "radix")) > 16 * 8  # a reference a token
    assert rows["radix", "forks"]["index_bytes"] > rows["radix", "chain"]["index_bytes"], "a node for each fork"


def test_hits_of_an_index_by_hand():
    """Room for three pages. A and B take the last page from each other; C finds nothing, and leaves one page to A."""
    a, b, c = [b"s", b"t", b"a"], [b"s", b"t", b"b"], [b"x", b"y"]
    asked = [prefix_index.Asked("one", pages) for pages in (a, b, a, c, a)]
    for design in (HashChain, RadixTree):
        assert [prefix_index.index_hits(asked[:n], design(Lru()), 3) for n in range(1, 6)] == [0, 2, 4, 4, 5]
    twice = [prefix_index.Asked(tenant, a) for tenant in ("one", "two", "one")]
    assert prefix_index.index_hits(twice, RadixTree(Lru()), 6) == 3, "tenants share no page"


def test_no_policy_beats_belady_on_the_trace_of_many_tenants():
    trace = prefix_index.tenants(200)
    assert trace == prefix_index.tenants(200) and len(trace) == 200
    asked = [page for _, pages in trace for page in pages]
    found = prefix_index.evictions(200, shares=(0.1, 1.0))
    assert (found["requests"], found["asked"], found["different"]) == (200, len(asked), len(set(asked)))
    belady = [row for row in found["rows"] if row["policy"] == "belady"]
    assert len(belady) == 2 and len(found["rows"]) == 2 * (2 * len(prefix_index.POLICIES) + 1)
    assert all(0 < row["over_belady"] <= 1 for row in found["rows"])
    everything = {row["hit_rate"] for row in found["rows"] if row["pages"] == len(set(asked))}
    assert everything == {(len(asked) - len(set(asked))) / len(asked)}, "with room for all, a page is missed once"
    popular = [sum(one.tenant == str(tenant) for one in trace) for tenant in range(50)]
    assert popular[0] > statistics.mean(popular) > popular[49]
