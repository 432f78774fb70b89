"""Clusters as data: those that are described here, regular ones, and descriptions that are wrong."""

import pytest

from minilib.numbers.machine import Link, Machine
from minilib.operations.placement.cluster.description import expand_names, stored_clusters
from minilib.operations.placement.cluster.errors import (
    InvalidTopology,
    NoGpus,
    NoSuchCluster,
    TopologyLoop,
    TwoParents,
    UnknownLink,
    UnknownMember,
)
from minilib.operations.placement.cluster.topology import JOINS, LEVELS, GpuCluster, Host

HEAD = 'name = "small"\ngpu = "h100-sxm"\n'
HOSTS = '[[host]]\nnames = ["a[1-2]", "b1"]\ngpus = 4\n'


def described(tmp_path, text: str, head: str = HEAD) -> GpuCluster:
    path = tmp_path / "cluster.toml"
    path.write_text(head + text, encoding="utf-8")
    return GpuCluster.from_toml(path)


@pytest.mark.parametrize(
    ("name", "gpus", "counts", "per_domain", "cliff"),
    [("h100-superpod", 256, (32, 32, 8, 1), 8, 9), ("gb200-nvl72", 8 * 18 * 4, (144, 8, 8, 1), 72, 18)],
)
def test_real_clusters(name, gpus, counts, per_domain, cliff):
    """At the edge of an NVL72 a GPU reaches 18 times less than within, like for like."""
    cluster = GpuCluster.from_toml(name)
    assert cluster.gpus == gpus
    assert tuple(len(cluster.groups(level)) for level in LEVELS) == counts
    assert {len(group.gpus) for group in cluster.groups("domain")} == {per_domain}
    assert cluster.link(0, 1).bandwidth == cliff * cluster.link(0, gpus - 1).bandwidth
    assert cluster.priced().domain == per_domain
    assert cluster.priced().gpu is not None and cluster.priced(16).gpus == 16


def test_every_stored_cluster_can_be_read():
    assert stored_clusters() == ["gb200-nvl72", "h100-superpod"]
    with pytest.raises(NoSuchCluster, match="gb200-nvl72, h100-superpod"):
        GpuCluster.from_toml("nowhere")


def test_groups_have_consecutive_gpus_and_partition_them():
    cluster = GpuCluster.regular(5, 6, 4, nvlink_domain=8, racks_per_unit=2)
    for level in LEVELS:
        groups = cluster.groups(level)
        assert [gpu for group in groups for gpu in group.gpus] == list(range(120))
        assert [host for group in groups for host in group.hosts] == list(range(30))
        for group in groups:
            assert cluster.numbers_of(level, group.gpus) == [group.number] * len(group.gpus)
    assert [len(cluster.groups(level)) for level in LEVELS] == [30, 15, 5, 3]


def test_what_joins_two_gpus():
    cluster = GpuCluster.regular(4, 4, 2, nvlink_domain=4, racks_per_unit=2)
    assert [cluster.joined_by(0, other) for other in (0, 1, 2, 4, 8, 16)] == [
        "domain", "domain", "domain", "rack", "unit", "spine",
    ]  # fmt: skip
    assert cluster.link(0, 3).bandwidth == Machine.datasheet("h100-sxm").link("nvlink").bandwidth
    assert cluster.host_named("host3") == 3 and cluster.host_of(7) == 3
    with pytest.raises(LookupError, match="no host"):
        cluster.host_named("host99")
    for nobody in (-1, 32, True, 1.0):
        with pytest.raises(IndexError, match="none of the 32"):
            cluster.host_of(nobody)


def test_a_description_is_read_in_topology_order(tmp_path):
    """Hosts of a rack stand in a row however the file has them; what is not described is a group of its own."""
    cluster = described(
        tmp_path,
        HOSTS + '[[host]]\nnames = ["c"]\ngpus = 2\nlabels = { zone = "z" }\n'
        '[[rack]]\nnames = ["r0"]\ncontains = ["a2", "c"]\n[[rack]]\nnames = ["r1"]\ncontains = ["a1", "b1"]\n'
        '[links]\nrack = { bandwidth = 1e9, latency = 0.5 }\nunit = "nvlink"\n',
    )
    racks = {group.name: [cluster.hosts[host].name for host in group.hosts] for group in cluster.groups("rack")}
    assert racks == {"r0": ["a2", "c"], "r1": ["a1", "b1"]}
    assert [host.unit for host in cluster.hosts] == ["r0", "r0", "r1", "r1"]
    assert [host.domain for host in cluster.hosts] == [host.name for host in cluster.hosts]
    assert cluster.hosts[1].labels == {"zone": "z"} and cluster.gpus == 14
    assert cluster.links["rack"] == Link(1e9, 0.5) and set(cluster.links) == set(JOINS)
    assert cluster.links["unit"] == cluster.links["domain"]


def test_names_are_expanded_as_slurm_does():
    assert expand_names(["node[08-10]", "x", "a[1-2]b"]) == ["node08", "node09", "node10", "x", "a1b", "a2b"]
    for wrong in ("", "n[1", "n[]", 7):
        with pytest.raises(InvalidTopology, match="a name is a string"):
            expand_names([wrong])


RACKS = '[[rack]]\nnames = ["r"]\ncontains = ["a1"]\n'


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ('[[rack]]\nnames = ["r"]\ncontains = ["q"]\n[[rack]]\nnames = ["q"]\ncontains = ["r"]\n', TopologyLoop,
         "r in q in r"),
        ('[[unit]]\nnames = ["u"]\ncontains = ["u"]\n', TopologyLoop, "u in u"),
        (RACKS + '[[rack]]\nnames = ["q"]\ncontains = ["a[1-2]"]\n', TwoParents, "'a1' stands in 'r' and in 'q'"),
        ('[[rack]]\nnames = ["r"]\ncontains = ["nobody"]\n', UnknownMember, "'nobody'"),
        ('[links]\nmoon = "nvlink"\n', UnknownLink, "'moon'"),
        ('[links]\nrack = "infiniband"\n', UnknownLink, "no link 'infiniband'; it has: nvlink"),
        ("[links]\nrack = 7\n", UnknownLink, "got 7"),
        ("[links]\nrack = { latency = 1.0 }\n", UnknownLink, "bandwidth"),
        ('[[host]]\nnames = ["z"]\ngpus = 0\n', NoGpus, "host 'z' has 0 GPUs"),
        ('[[host]]\nnames = ["z"]\ngpus = 1.5\n', NoGpus, "1.5"),
        ('[[host]]\nnames = ["a1"]\ngpus = 1\n', InvalidTopology, "described twice"),
        (RACKS + '[[domain]]\nnames = ["d"]\ncontains = ["r"]\n', InvalidTopology, "contains rack 'r'"),
        ('[[rack]]\ncontains = ["a1"]\n', InvalidTopology, "names"),
        ("[zone]\n", InvalidTopology, "'zone'"),
    ],
)  # fmt: skip
def test_what_is_no_tree_is_refused_by_name(tmp_path, text, error, said):
    with pytest.raises(error, match=".*".join(said.split(" … "))):
        described(tmp_path, HOSTS + text)


def test_other_bad_input(tmp_path):
    with pytest.raises(NoGpus, match="no \\[\\[host\\]\\]"):
        described(tmp_path, "")
    with pytest.raises(InvalidTopology, match="has a gpu"):
        described(tmp_path, HOSTS, head='name = "x"\n')
    with pytest.raises(UnknownLink, match="rtx-4090 has no link 'nvlink'"):
        described(tmp_path, HOSTS, head='name = "x"\ngpu = "rtx-4090"\n')
    with pytest.raises(NoGpus, match="no host"):
        GpuCluster("x", "h100-sxm", ())
    apart = [Host("a", 1, "a", "r", "u"), Host("b", 1, "b", "q", "u"), Host("c", 1, "c", "r", "u")]
    with pytest.raises(InvalidTopology, match="rack 'r' do not stand in a row"):
        GpuCluster("x", "h100-sxm", tuple(apart))
    for domain in (12, 5, 24):
        with pytest.raises(InvalidTopology, match="whole hosts"):
            GpuCluster.regular(1, 4, 8, nvlink_domain=domain)
    with pytest.raises(NoGpus, match="gpus_per_host"):
        GpuCluster.regular(1, 4, 0)
