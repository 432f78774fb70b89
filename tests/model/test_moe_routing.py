"""Who goes where, against loops written from the papers."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.model.moe import Router, Routing, combine, route
from minilib.model.moe.config import MoEConfig


def routing_of(logits, bias=None, **config) -> Routing:
    logits = torch.as_tensor(logits, dtype=torch.float64)
    experts = logits.shape[1]
    bias = torch.zeros(experts) if bias is None else torch.as_tensor(bias)
    routing = route(logits, bias, MoEConfig(experts, **{"top_k": 1, "intermediate_size": 1, **config}))
    routing.check_invariants()
    return routing


def pairs_of(routing: Routing) -> dict[tuple[int, int], float]:
    """(token, expert) → weight."""
    experts = torch.repeat_interleave(routing.counts).tolist()
    return dict(zip(zip(routing.tokens.tolist(), experts, strict=True), routing.weights.tolist(), strict=True))


# The papers, as loops


def gate(logits, config) -> list[list[float]]:
    if config.gate == "sigmoid":
        return [[1 / (1 + math.exp(-x)) for x in row] for row in logits]
    return [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in logits]


def choices_of(preference: list[float], config: MoEConfig) -> list[int]:
    """DeepSeek-V3, 2.1.2: the best experts of the groups whose two best experts have the largest sums."""
    size = config.num_experts // config.num_groups
    groups = [range(size * group, size * (group + 1)) for group in range(config.num_groups)]
    worth = [sum(sorted((preference[e] for e in group), reverse=True)[:2]) for group in groups]
    allowed = sorted(range(config.num_groups), key=lambda g: (-worth[g], g))[: config.top_groups]
    experts = [e for group in allowed for e in groups[group]]
    return sorted(experts, key=lambda e: (-preference[e], e))[: config.top_k]


def capacity_of(tokens: int, config: MoEConfig) -> int:
    """Switch, equation 3: tokens over experts, times the capacity factor; here for top_k pairs a token."""
    if config.capacity_factor is None:
        return tokens
    share = Fraction(tokens * config.top_k, config.num_experts) * Fraction(str(config.capacity_factor))
    return min(tokens, math.ceil(share))


def tokens_choose(scores, bias, config) -> tuple[dict, list[int]]:
    """Kept pairs with their weights, and each expert's load."""
    chosen = [choices_of([s + b for s, b in zip(row, bias, strict=True)], config) for row in scores]
    queues = [[] for _ in range(config.num_experts)]
    for rank in range(config.top_k):  # GShard, algorithm 1: all first choices before any second one
        for token, experts in enumerate(chosen):
            queues[experts[rank]].append(token)
    kept = {}
    for expert, queue in enumerate(queues):
        if config.drop == "probability":  # DeepSpeed's "probs"
            queue = sorted(queue, key=lambda token: -scores[token][expert])
        for token in queue[: capacity_of(len(scores), config)]:
            total = sum(scores[token][e] for e in chosen[token]) if config.normalize else 1.0
            kept[token, expert] = scores[token][expert] / total * config.routed_scaling_factor
    return kept, [len(queue) for queue in queues]


def experts_choose(scores, bias, config) -> tuple[dict, list[int]]:
    """Zhou et al. 2022, equations 1 and 2: each expert the k tokens that like it best."""
    room, kept = capacity_of(len(scores), config), {}
    for expert in range(config.num_experts):
        likes = sorted(range(len(scores)), key=lambda token: (-(scores[token][expert] + bias[expert]), token))
        kept |= {(token, expert): scores[token][expert] * config.routed_scaling_factor for token in likes[:room]}
    return kept, [room] * config.num_experts


def draw_case(draw) -> tuple[list, list, dict]:
    groups, size = draw(st.sampled_from([(1, 1), (1, 2), (1, 5), (2, 1), (2, 3), (3, 2), (4, 2)]))
    experts = groups * size
    choice = draw(st.sampled_from(["token", "token", "expert"]))
    top_groups = draw(st.integers(1, groups)) if choice == "token" else 1
    config = {
        "top_k": draw(st.integers(1, size * top_groups)),
        "choice": choice,
        "num_groups": groups if choice == "token" else 1,
        "top_groups": top_groups,
        "gate": draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalize": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "drop": draw(st.sampled_from(["position", "probability"])),
        "capacity_factor": draw(st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 3.0] + [None] * (choice == "token"))),
    }
    few = st.integers(-4, 4).map(lambda x: x / 2)  # so that many are equal
    logits = draw(st.lists(st.lists(few, min_size=experts, max_size=experts), max_size=7))
    bias = draw(st.lists(st.sampled_from([-0.5, 0.0, 0.0, 0.25]), min_size=experts, max_size=experts))
    return logits, bias, config


@given(st.data())
@settings(max_examples=200)
def test_routing_is_that_of_loops_written_from_the_papers(data):
    logits, bias, options = draw_case(data.draw)
    found = routing_of(torch.tensor(logits, dtype=torch.float64).view(-1, len(bias)), bias, **options)
    config = MoEConfig(len(bias), intermediate_size=1, **options)
    scores = found.scores.tolist()
    assert sum(scores, []) == pytest.approx(sum(gate(logits, config), []), rel=1e-12)
    kept, wanted = (experts_choose if config.choice == "expert" else tokens_choose)(scores, bias, config)
    assert pairs_of(found) == pytest.approx(kept, rel=1e-12)
    assert found.wanted.tolist() == wanted
    assert found.counts.tolist() == [sum(e == expert for _, e in kept) for expert in range(len(bias))]
    # Nothing is lost and nothing is made up.
    assert len(found.tokens) + found.dropped == sum(wanted)
    if config.choice == "token":
        assert sum(wanted) == len(logits) * config.top_k
        assert found.counts.tolist() == [min(n, capacity_of(len(logits), config)) for n in wanted]
    else:
        assert found.dropped == 0


# Capacity


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "room"),
    [(1.0, 8, 1, 4, 2), (1.25, 8, 1, 4, 3), (1, 8, 2, 4, 4), (1.0, 9, 1, 4, 3), (9.0, 8, 1, 4, 8), (0.01, 8, 1, 4, 1)],
)
def test_capacity_is_that_of_switch_rounded_up(factor, tokens, top_k, experts, room):
    assert MoEConfig(experts, top_k, 1, capacity_factor=factor).capacity(tokens) == room
    assert MoEConfig(experts, top_k, 1).capacity(tokens) is None


def test_a_capacity_that_is_a_whole_number_is_not_rounded_up():
    """1.1 · 100 is above 110 in floating point."""
    for percent in range(10, 400, 10):
        assert MoEConfig(10, 1, 1, capacity_factor=percent / 100).capacity(100) == min(percent // 10, 100)


def test_first_choices_find_room_before_second_ones_and_earlier_tokens_before_later_ones():
    """All prefer expert 1, then 0, but for the last token, which has it the other way round."""
    logits = [[1, 2, 0, 0], [1, 2, 0, 0], [1, 2, 0, 0], [2, 1, 0, 0]]
    found = routing_of(logits, top_k=2, capacity_factor=1.0)  # room for two
    assert sorted(pairs_of(found)) == [(0, 0), (0, 1), (1, 1), (3, 0)]  # token 3's second choice comes too late
    assert found.wanted.tolist() == [4, 4, 0, 0] and found.dropped == 4


def test_by_probability_the_likeliest_find_room():
    """Of one choice a token this is V-MoE's batch prioritised routing."""
    logits = [[1, 0], [3, 0], [2, 0], [3, 0]]
    found = routing_of(logits, capacity_factor=1.0, drop="probability")
    assert sorted(pairs_of(found)) == [(1, 0), (3, 0)]
    found = routing_of(logits, capacity_factor=0.5, drop="probability")
    assert sorted(pairs_of(found)) == [(1, 0)]  # the earlier of two equal ones


def kept_by(worth, wanted, capacity: int) -> set[tuple[int, int]]:
    """Each expert keeps the `capacity` pairs of the largest worth, earlier tokens first; worth[token][expert]."""
    kept = set()
    for expert in range(len(worth[0])):
        queue = [token for token in range(len(worth)) if expert in wanted[token]]
        kept |= {(token, expert) for token in sorted(queue, key=lambda t: -worth[t][expert])[:capacity]}
    return kept


def softmax_over(row, experts) -> list[float]:
    total = sum(math.exp(row[e]) for e in experts)
    return [math.exp(x) / total for x in row]


def rules_of_others(logits, top_k: int, capacity: int) -> dict[str, set[tuple[int, int]]]:
    """Pairs that "probs" keeps in DeepSpeed's topkgating and, as it is by default, in Megatron-LM's router."""
    wanted = [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in logits]
    over_all = [softmax_over(row, range(len(row))) for row in logits]
    over_chosen = [softmax_over(row, chosen) for row, chosen in zip(logits, wanted, strict=True)]
    return {"DeepSpeed": kept_by(over_all, wanted, capacity), "Megatron": kept_by(over_chosen, wanted, capacity)}


def test_by_probability_is_deepspeeds_rule_and_not_megatrons_default():
    """Token 0 is surer of expert 0 among all three, token 1 among the two that it chose."""
    logits = [[2.0, 2.1, -9.0], [2.0, 1.9, 1.8]]
    found = set(pairs_of(routing_of(logits, top_k=2, capacity_factor=0.75, drop="probability")))  # room for one
    theirs = rules_of_others(logits, top_k=2, capacity=1)
    assert found == theirs["DeepSpeed"] == {(0, 0), (0, 1)}
    assert theirs["Megatron"] == {(1, 0), (0, 1)}


def test_by_probability_in_random_cases():
    generator, differ = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        logits = torch.randn(12, 6, generator=generator, dtype=torch.float64)
        found = set(pairs_of(routing_of(logits, top_k=2, capacity_factor=0.75, drop="probability")))
        theirs = rules_of_others(logits.tolist(), top_k=2, capacity=3)
        assert found == theirs["DeepSpeed"]
        differ += found != theirs["Megatron"]
    assert differ > 25, "the two rules are hardly told apart"


def test_who_finds_no_room_does_not_weigh_more_elsewhere():
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 3)
    kept = pairs_of(routing_of(logits, top_k=2, capacity_factor=0.5))
    everything = pairs_of(routing_of(logits, top_k=2))
    assert len(kept) == 2 and len(everything) == 6
    assert all(everything[pair] == weight for pair, weight in kept.items())


# Ties


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_among_equals_the_lowest_numbers_win(gate):
    tokens, experts = 40, 8  # more than what sorts that are not stable leave alone
    same = torch.zeros(tokens, experts)
    found = routing_of(same, top_k=3, gate=gate)
    assert found.wanted.tolist() == [tokens] * 3 + [0] * 5
    assert found.tokens.tolist() == list(range(tokens)) * 3
    for drop in ("position", "probability"):
        found = routing_of(same, top_k=3, gate=gate, drop=drop, capacity_factor=0.5)
        assert found.tokens.tolist() == list(range(8)) * 3 and found.dropped == 3 * (tokens - 8)
    found = routing_of(same, top_k=3, gate=gate, num_groups=4, top_groups=2)
    assert found.wanted.tolist() == [tokens] * 3 + [0] * 5
    found = routing_of(same, top_k=2, gate=gate, choice="expert", capacity_factor=0.5)
    assert found.tokens.tolist() == list(range(5)) * experts


def test_equal_tokens_go_the_same_way_and_again_with_the_same_bits():
    torch.manual_seed(0)
    config = MoEConfig(64, 6, 1, gate="sigmoid", num_groups=8, top_groups=3, capacity_factor=1.0, drop="probability")
    router = Router(config, 16)
    router.bias.uniform_(-0.1, 0.1)
    x = torch.randn(1, 16).repeat(200, 1)
    first, second = router(x), router(x)
    first.check_invariants()
    assert first.dropped == 200 * 6 - 6 * 19 and first.wanted.unique().tolist() == [0, 200]
    for name in ("tokens", "weights", "offsets", "wanted", "scores", "logits"):
        assert torch.equal(getattr(first, name), getattr(second, name))


# Groups and bias


def test_a_token_stays_within_its_groups():
    logits = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    found = pairs_of(routing_of(logits, top_k=4, num_groups=4, top_groups=2))
    for token in range(50):
        assert len({expert // 3 for t, expert in found if t == token}) <= 2
    free = pairs_of(routing_of(logits, top_k=4))
    assert max(len({expert // 3 for t, expert in free if t == token}) for token in range(50)) > 2


def test_a_bias_changes_who_is_chosen_and_no_weight():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    plain = routing_of(logits, gate="sigmoid", top_k=2)
    pushed = routing_of(logits, bias=[-1.0, 0.0, 0.0, 1.0], gate="sigmoid", top_k=2)
    assert sorted(pairs_of(plain)) == [(0, 0), (0, 1)] and sorted(pairs_of(pushed)) == [(0, 1), (0, 3)]
    assert torch.equal(plain.scores, pushed.scores)
    one, three = pushed.scores[0, [1, 3]].tolist()
    assert pairs_of(pushed) == pytest.approx({(0, 1): one / (one + three), (0, 3): three / (one + three)}, rel=1e-12)


def test_biases_get_no_gradient_and_logits_do():
    logits = torch.randn(5, 4, requires_grad=True)
    bias = torch.zeros(4, requires_grad=True)
    route(logits, bias, MoEConfig(4, 2, 1, normalize=False)).weights.sum().backward()
    assert bias.grad is None and logits.grad.abs().sum() > 0


# Ends of the range


@pytest.mark.parametrize("capacity_factor", [None, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 4}, {"num_groups": 2, "top_groups": 2}, {"drop": "probability"}, {"choice": "expert"}],
    ids=str,
)
def test_no_token_and_one_token(options, capacity_factor):
    if options.get("choice") == "expert" and capacity_factor is None:
        capacity_factor = 2.0
    for tokens in (0, 1):
        found = routing_of(torch.zeros(tokens, 4), **options, capacity_factor=capacity_factor)
        per_token = 4 if options.get("choice") == "expert" else options.get("top_k", 1)
        assert len(found.tokens) == tokens * per_token  # room is rounded up, so one token has some
        assert combine(torch.ones(len(found.tokens), 3), found, tokens).shape == (tokens, 3)


def test_one_expert_gets_all_and_weighs_one():
    found = routing_of(torch.randn(9, 1))
    assert found.tokens.tolist() == list(range(9)) and found.weights.tolist() == [1.0] * 9
    assert routing_of(torch.randn(9, 1), gate="sigmoid").weights.tolist() == [1.0] * 9


def test_all_experts_chosen_is_a_dense_mixture():
    logits = torch.randn(9, 4, dtype=torch.float64)
    found = routing_of(logits, top_k=4)
    assert found.wanted.tolist() == [9] * 4
    dense = torch.zeros(9, 4, dtype=torch.float64)
    dense[found.tokens, torch.repeat_interleave(found.counts)] = found.weights
    torch.testing.assert_close(dense, logits.softmax(-1))


def test_all_tokens_to_one_expert():
    logits = torch.zeros(9, 4).index_fill(1, torch.tensor([2]), 5.0)
    assert routing_of(logits).counts.tolist() == [0, 0, 9, 0]
    found = routing_of(logits, capacity_factor=1.0)
    assert found.counts.tolist() == [0, 0, 3, 0] and found.dropped == 6 and found.tokens.tolist() == [0, 1, 2]


def test_scores_that_vanish_make_weights_of_zero_and_not_of_nothing():
    found = routing_of(torch.full((3, 4), -1000.0), gate="sigmoid", top_k=2)
    assert found.weights.tolist() == [0.0] * 6


# What is refused

REFUSED = [
    ({"num_experts": 0}, "num_experts must be a whole number ≥ 1, got 0"),
    ({"num_experts": 4.0}, "num_experts must be a whole number ≥ 1, got 4.0"),
    ({"top_k": 0}, "top_k must be a whole number ≥ 1, got 0"),
    ({"intermediate_size": -1}, "intermediate_size must be a whole number ≥ 1, got -1"),
    ({"num_groups": 0}, "num_groups must be a whole number ≥ 1, got 0"),
    ({"top_groups": 0}, "top_groups must be a whole number ≥ 1, got 0"),
    ({"num_shared_experts": -1}, "num_shared_experts must be a whole number ≥ 0, got -1"),
    ({"gate": "relu"}, "gate is one of softmax, sigmoid; got 'relu'"),
    ({"choice": "both"}, "choice is one of token, expert; got 'both'"),
    ({"drop": "age"}, "drop is one of position, probability; got 'age'"),
    ({"num_groups": 3}, "num_groups divides num_experts .* got 8 experts, 3 groups, 1 of them"),
    ({"num_groups": 2, "top_groups": 3}, "top_groups is at most num_groups; got 8 experts, 2 groups, 3 of them"),
    ({"top_k": 9}, "top_k is at most the 8 experts that a token may choose from, got 9"),
    ({"num_groups": 4, "top_k": 3}, "top_k is at most the 2 experts that a token may choose from, got 3"),
    ({"routed_scaling_factor": 0}, "routed_scaling_factor is positive and finite; got 0"),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is positive and finite; got nan"),
    ({"capacity_factor": 0}, "capacity_factor is positive, or None for room for all; got 0"),
    ({"capacity_factor": -1.0}, "capacity_factor is positive, or None for room for all; got -1.0"),
    ({"capacity_factor": math.nan}, "capacity_factor is positive, or None for room for all; got nan"),
    ({"capacity_factor": math.inf}, "capacity_factor is positive, or None for room for all; got inf"),
    ({"choice": "expert"}, "choice='expert' needs a capacity_factor, and knows no groups"),
    ({"choice": "expert", "capacity_factor": 1.0, "num_groups": 2, "top_groups": 2}, "knows no groups"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[str(wrong) for wrong, _ in REFUSED])
def test_a_config_that_does_not_fit_together_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 8, "top_k": 2, "intermediate_size": 1, **wrong})


def test_invariants_notice_what_is_wrong():
    good = routing_of(torch.zeros(3, 4), top_k=2)
    for change in (
        {"tokens": good.tokens.new_tensor([0, 0, 2, 0, 1, 2])},  # twice
        {"offsets": good.offsets - 1},
        {"weights": good.weights[1:]},
        {"wanted": good.wanted - 1},
    ):
        with pytest.raises(AssertionError):
            Routing(**{**good.__dict__, **change}).check_invariants()
