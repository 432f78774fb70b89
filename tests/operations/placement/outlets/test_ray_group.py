"""A placement as Ray's bundles; with a Ray, they are reserved."""

import pytest

from minilib.operations.placement.outlets.hosted_job import HostedJob, InvalidOutlet
from minilib.operations.placement.outlets.ray_group import SHARE, STRATEGIES, RayBundles

JOB = HostedJob("gpt", ("train",), ("h3", "h1", "h3"), 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bundle_for_each_worker(strategy):
    found = RayBundles.of(JOB, strategy)
    assert found == RayBundles("gpt", ({"GPU": 2.0},) * 3, strategy)


def test_bundles_that_name_hosts():
    found = RayBundles.of(JOB, addresses={"h1": "10.0.0.1", "h3": "10.0.0.3"})
    assert [sorted(bundle) for bundle in found.bundles] == [
        ["GPU", "node:10.0.0.3"], ["GPU", "node:10.0.0.1"], ["GPU", "node:10.0.0.3"]
    ]  # fmt: skip
    assert all(value == SHARE for bundle in found.bundles for key, value in bundle.items() if key != "GPU")
    assert SHARE * 100 < 1, "many workers share a host's one unit"


def test_bad_input():
    with pytest.raises(InvalidOutlet, match="a strategy is one of PACK"):
        RayBundles.of(JOB, "pack")
    with pytest.raises(InvalidOutlet, match="host 'h3' has no address"):
        RayBundles.of(JOB, addresses={"h1": "10.0.0.1"})
    with pytest.raises(InvalidOutlet, match="STRICT_PACK chooses them"):
        RayBundles.of(JOB, "STRICT_PACK", {"h1": "10.0.0.1", "h3": "10.0.0.3"})
