"""Paged attention on a real GPU. Without one these tests are SKIPPED, and say so."""

import itertools

import pytest
import torch

from minilib.kernels.paged_attention import cost, paged_attention, reference
from minilib.numbers.measure import measure
from minilib.numbers.probes import cuda
from tests.kernels.paged_attention_cases import make_case
from tests.kernels.place import distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1.6e-2}  # of 1 + |value|; the GPU's exp2 is an approximation
LENGTHS = [edge + offset for edge in (16, 32, 64, 256, 1024) for offset in (-1, 0, 1)]
BATCHES = {
    "decode": [(1, length) for length in LENGTHS],
    "prefill": [(length, length) for length in LENGTHS] + [(100, 1024), (7, 513)],
    "uneven": [(1, 9000), *[(1, 100 + length) for length in range(15)]],
    "mixed": [(1, 777), (0, 0), (300, 1000), (0, 9), (1, 1), (33, 64), (2, 2000)],
}


@pytest.fixture(autouse=True)
def poisoned():
    """torch fills what it allocates without a value with NaN: a row that no program writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the oracles' cuBLAS may be as it likes
    yield
    torch.use_deterministic_algorithms(False)


def check(batch, dtype, split_keys=None, max_q_len=None, **shape):
    args, expected = make_case(batch, dtype=dtype, device="cuda", **shape)
    ours = paged_attention(*args, split_keys=split_keys, max_q_len=max_q_len)
    assert distance(ours, expected) < TOLERANCE[dtype]
    assert distance(ours, reference(*args)) < TOLERANCE[dtype]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("head_dim", (16, 32, 64, 128, 256))
@pytest.mark.parametrize("dtype", ("fp32", "fp16", "bf16"))
def test_it_agrees_with_both_oracles(dtype, head_dim, batch):
    for page_size, heads, split_keys in itertools.product((1, 2, 16, 64), ((2, 2), (8, 2)), (4096, 256, None)):
        check(BATCHES[batch], dtype, split_keys, head_dim=head_dim, page_size=page_size, heads=heads)


@pytest.mark.parametrize("heads", ((14, 2), (40, 2), (71, 1), (128, 1)))
def test_groups_of_any_size(heads):
    check(BATCHES["mixed"], "bf16", heads=heads, head_dim=64)
    check(BATCHES["decode"], "fp16", split_keys=64, heads=heads, head_dim=128)


@pytest.mark.parametrize("max_q_len", (1, 7, 10**6))
def test_a_wrong_hint_changes_no_result(max_q_len):
    check(BATCHES["mixed"], "bf16", max_q_len=max_q_len, head_dim=128, heads=(8, 2))


def test_padding_strides_and_blind_rows():
    check([(1, 9), (2, 9), (0, 0)], "bf16", padding=200, split_keys=1)
    check([(4, 2), (3, 0)], "fp32", split_keys=1)
    check(BATCHES["mixed"], "bf16", strided=True, heads=(8, 2), head_dim=128, page_size=3)


@pytest.mark.parametrize("far", ("pages", "queries"))
def test_addresses_beyond_two_to_the_31(far):
    """The last page, or the last token, lies more than 2³¹ elements from the first: 4.3 GB in bfloat16 each."""
    batch = [(1, 40)] if far == "pages" else [(1, 40)] * 3
    (q, k, v, tables, contexts, starts), expected = make_case(batch, head_dim=128, dtype="bf16", device="cuda")
    if far == "pages":
        shift = 2**31 // k[0].numel() + 1
        wide = []
        for pages in (k, v):
            room = torch.empty((len(pages) + shift, *pages.shape[1:]), dtype=pages.dtype, device="cuda")
            room[shift:] = pages
            wide.append(room)
        (k, v), tables = wide, tables + shift
    else:
        stride = 2**30 + 128
        room = torch.empty(2 * stride + 4 * 128, dtype=q.dtype, device="cuda")
        q = room.as_strided(q.shape, (stride, 128, 1)).copy_(q)
    assert distance(paged_attention(q, k, v, tables, contexts, starts), expected) < TOLERANCE["bf16"]


def test_it_never_waits_for_the_gpu_and_replays_in_a_graph():
    args, expected = make_case(BATCHES["decode"], heads=(8, 2), head_dim=128, dtype="bf16", padding=5, device="cuda")
    torch.use_deterministic_algorithms(False)
    paged_attention(*args)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        paged_attention(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    q, graph = args[0].clone(), torch.cuda.CUDAGraph()
    args[0].zero_()
    with torch.cuda.graph(graph):
        out = paged_attention(*args)
    args[0].copy_(q)
    graph.replay()
    assert distance(out, expected) < TOLERANCE["bf16"]


@pytest.mark.parametrize("lens", ([4096] * 64, [32768], [32768] + [1024] * 63), ids=("even", "one", "one long"))
def test_decode_moves_bytes_nearly_as_fast_as_a_copy(lens, record_property):
    torch.use_deterministic_algorithms(False)  # poisoning its own output would be timed too
    num_heads, num_kv_heads, head_dim, page_size, sequences = 32, 8, 128, 16, len(lens)
    pages, width = sum(lens) // page_size, max(lens) // page_size
    k, v = (torch.randn(pages, num_kv_heads, page_size, head_dim, device="cuda").bfloat16() for _ in "kv")
    q = torch.randn(sequences, num_heads, head_dim, device="cuda").bfloat16()
    tables = torch.zeros(sequences, width, dtype=torch.int32, device="cuda")
    for row, own in zip(
        tables, torch.randperm(pages, device="cuda").int().split([n // page_size for n in lens]), strict=True
    ):
        row[: len(own)] = own
    contexts = torch.tensor(lens, dtype=torch.int32, device="cuda")
    starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda")
    moved = cost(num_heads, num_kv_heads, head_dim, lens, [1] * sequences, "bf16", page_size).bytes
    seconds = measure(lambda: paged_attention(q, k, v, tables, contexts, starts, max_q_len=1)).seconds
    share = moved / seconds / cuda.hbm_copy_bandwidth()
    record_property("share_of_copy_bandwidth", share)
    # The aim on an H200 is 0.85 for the first; a bound for any GPU is generous, and the figure is what is reported.
    assert share > 0.6, f"{share:.2f} of the measured copy bandwidth, {seconds * 1e6:.0f} µs"
