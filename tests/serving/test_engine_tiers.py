"""Pages that leave the engine's pool come back from host memory or a file, where that is cheaper; nothing is lost."""

import copy
import dataclasses

import pytest
import torch

from minilib.mechanisms.caching import Fifo, Lru
from minilib.numbers.machine import Machine, NotOnThisMachine
from minilib.serving.cache.page_file import PageFileError
from minilib.serving.cache.tiers import SecondTier, fingerprint
from minilib.serving.engine import Engine
from tests.model.random_weights import randomize
from tests.serving.served import engine, finish, greedy, likeliest, models, prompt
from tests.serving.test_engine_prefix import COUNT, DESIGNS, ask

PLACES = {"memory": (40, 0), "file": (0, 40), "memory, then file": (3, 40)}  # pages of each
both = pytest.mark.parametrize("design", DESIGNS)
everywhere = pytest.mark.parametrize("place", PLACES)


def tiered(folder, place, design="hash", num_pages=8, machine=None, page_size=4, **options):
    """An engine of eight pages, and more elsewhere."""
    in_memory, in_file = PLACES[place]
    tier = SecondTier(machine, folder / "pages" if in_file else None, in_file)
    return engine(num_pages, page_size, num_swap_pages=in_memory, prefix_cache=design, second_tier=tier, **options)


def push_out(served):
    """A request of the whole pool: all that was kept leaves."""
    ask(served, prompt(served.cache.num_slots), likeliest(1))


@both
@everywhere
def test_pages_that_left_come_back(tmp_path, place, design):
    """Tokens are counted: what came back is not computed."""
    served = tiered(tmp_path, place, design)
    assert ask(served, prompt(21)) == (greedy(prompt(21), COUNT), 0, 21 + COUNT - 1)
    push_out(served)
    assert ask(served, prompt(21)) == (greedy(prompt(21), COUNT), 20, 1 + COUNT - 1)
    assert served.prefix.tokens_loaded == 20
    push_out(served)
    chat = prompt(21) + greedy(prompt(21), 8)
    assert ask(served, chat[:28], likeliest(2)) == (greedy(chat[:28], 2), 24, 4 + 1), "the last page is computed"
    assert served.cache.swap_pool.num_used == 0


@both
@everywhere
def test_what_is_there_still_is_shared_and_what_follows_comes_back(tmp_path, place, design):
    served = tiered(tmp_path, place, design)
    ask(served, prompt(29), likeliest(1))
    ask(served, prompt(15), likeliest(1))  # the end of the first leaves
    served.add_request("a", prompt(29), likeliest(1))
    left = served.prefix.num_matching(served.scheduler.waiting[0])
    assert 0 < left < 28
    finish(served)
    assert served.prefix.tokens_loaded == 28 - left


@both
def test_a_salt_separates_tiers_as_well(tmp_path, design):
    served = tiered(tmp_path, "memory, then file", design)
    for salt, cached in [("", 0), ("a", 0), ("", 20), ("a", 20), ("b", 0)]:
        assert ask(served, prompt(21), likeliest(1, cache_salt=salt)) == (greedy(prompt(21), 1), cached, 21 - cached)
        push_out(served)


def test_a_file_outlives_the_engine(tmp_path):
    """Another design and another pool find the same pages; the file names the model, and another one is refused."""
    served = tiered(tmp_path, "file", "hash")
    ask(served, prompt(21), likeliest(1))
    push_out(served)
    served.prefix.tiers.file.close()
    again = tiered(tmp_path, "file", "radix", num_pages=16)
    assert ask(again, prompt(21)) == (greedy(prompt(21), COUNT), 20, COUNT)
    again.prefix.tiers.file.close()
    other = randomize(copy.deepcopy(models()[1]), seed=9)
    with pytest.raises(PageFileError, match="another engine: model is"):
        Engine(other, 8, 4, prefix_cache="hash", second_tier=SecondTier(path=tmp_path / "pages", num_pages=40))


def test_a_fingerprint_is_that_of_all_weights():
    model = models()[1]
    assert fingerprint(copy.deepcopy(model)) == fingerprint(model)
    seen = {fingerprint(model)}
    for name, _ in model.named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[-1] += 1e-9
        seen.add(fingerprint(changed))
    assert len(seen) == 1 + len(list(model.named_parameters()))
    shape = copy.deepcopy(model)
    shape.config = dataclasses.replace(shape.config, rope_theta=shape.config.rope_theta * 2)
    assert fingerprint(shape) not in seen


def test_a_packed_model_has_a_fingerprint_of_its_own():
    prints = []
    for seed in (1, 1, 2):
        model = randomize(copy.deepcopy(models()[1]).float(), seed)
        prints.append(fingerprint(model))
        prints.append(fingerprint(Engine(model, 4, pack=True).model))
    assert prints[:2] == prints[2:4] and len(set(prints)) == 4


@both
@everywhere
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_crowd_gets_what_transformers_generates(tmp_path, place, preemption, design):
    """Prompts that share, in turns, in a pool with room for two of them."""
    texts = [prompt(9) + prompt(extra) for extra in (1, 2, 3, 4)] + [prompt(20), prompt(17)]
    served = tiered(tmp_path, place, design, num_pages=10, preemption=preemption, max_batch_tokens=11)
    for round_ in range(3):
        for number, text in enumerate(texts):
            served.add_request(f"{round_}/{number}", text, likeliest(COUNT))
        results = finish(served)
        for number, text in enumerate(texts):
            assert results.tokens[f"{round_}/{number}", 0] == greedy(text, COUNT)
    assert served.prefix.tokens_loaded > 0


def machine(flops=1e12, memory=1e10, disk=1e9):
    rates = {"disk_read": disk} if disk else {}
    return Machine("m", "a machine", "cpu", "measured", {"fp32": flops}, memory, 1e9, bandwidths=rates)


@pytest.mark.parametrize("place", ["memory", "file"])
def test_pages_come_back_where_that_is_cheaper_than_computing_them(tmp_path, place):
    """The price of both ways is worked out by hand, and the machine is as fast as is just enough, or just not."""
    model = copy.deepcopy(models()[1]).float()
    config, (in_memory, in_file) = model.config, PLACES[place]
    nbytes = 5 * 4 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    back = 2 * nbytes / 1e10 + (nbytes / 1e9 if in_file else 0)
    table = config.hidden_size * config.vocab_size  # of no use to tokens whose logits nobody needs
    layers = config.num_parameters - (1 if config.tie_embeddings else 2) * table
    work = 2 * layers * 20 + 4 * config.num_layers * config.num_heads * config.head_dim * (20 * 21 / 2)
    for share, cached in ((0.99, 20), (1.01, 0)):
        tier = SecondTier(machine(work / back * share), tmp_path / str(share) if in_file else None, in_file)
        served = Engine(model, 8, 4, num_swap_pages=in_memory, prefix_cache="hash", second_tier=tier)
        ask(served, prompt(21), likeliest(1))
        push_out(served)
        assert ask(served, prompt(21), likeliest(1))[1:] == (cached, 21 - cached)


@both
@pytest.mark.parametrize("disk, cached", [(1e5, 20), (1e12, 28)])
def test_pages_in_memory_come_back_though_those_behind_them_are_on_a_slow_disk(tmp_path, disk, cached, design):
    """The end of a chain leaves first, so host memory has pushed it on to the file."""
    model = copy.deepcopy(models()[1]).float()
    tier = SecondTier(machine(flops=1e9, memory=1e12, disk=disk), tmp_path / "pages", 40)
    served = Engine(model, 8, 4, num_swap_pages=5, prefix_cache=design, second_tier=tier)
    ask(served, prompt(29), likeliest(1))
    push_out(served)
    assert (len(served.prefix.tiers._in_memory), len(served.prefix.tiers.file)) == (5, 2)
    assert ask(served, prompt(29), likeliest(1)) == (greedy(prompt(29), 1), cached, 29 - cached)


@everywhere
def test_what_no_longer_fits_anywhere_is_computed(tmp_path, monkeypatch, place):
    monkeypatch.setitem(PLACES, place, tuple(min(3, pages) for pages in PLACES[place]))
    served = tiered(tmp_path, place)
    for seed in range(4):
        assert ask(served, prompt(21, seed))[0] == greedy(prompt(21, seed), COUNT)
        push_out(served)
    assert ask(served, prompt(21, 0)) == (greedy(prompt(21, 0), COUNT), 0, 21 + COUNT - 1)


def test_sequences_that_are_swapped_have_the_right_of_way(tmp_path):
    """Host memory is full of kept pages when a sequence has to move there."""
    served = tiered(tmp_path, "memory", num_pages=12, preemption="swap")
    for seed in range(6):
        ask(served, prompt(41, seed), likeliest(1))
    assert served.cache.swap_pool.num_idle == 40 and served.cache.swap_pool.num_free == 40
    served.add_request("a", prompt(21), likeliest(COUNT))
    outputs = served.step()
    served.scheduler.preempt(served.scheduler.running[0])
    served.check_invariants()
    assert served.cache.swap_pool.num_used == 6 and served.cache.swap_pool.num_idle == 34
    results = finish(served)
    assert (outputs[0].token_id, *results.tokens["a", 0]) == greedy(prompt(21), COUNT)


@both
def test_a_file_that_is_damaged_while_it_is_used_is_a_miss(tmp_path, design):
    """Every byte behind the first two pages is overwritten."""
    served = tiered(tmp_path, "file", design)
    ask(served, prompt(21), likeliest(1))
    push_out(served)
    file = served.prefix.tiers.file
    kept = sorted(file._slots.values(), reverse=True)[:2]  # the end of a chain left first, its beginning last
    raw = bytearray((tmp_path / "pages").read_bytes())
    for slot in set(file._slots.values()) - set(kept):
        raw[file._offset(slot) + 200] ^= 255
    (tmp_path / "pages").write_bytes(raw)
    answer, cached, computed = ask(served, prompt(21))
    assert (answer, cached + computed) == (greedy(prompt(21), COUNT), 21 + COUNT - 1) and cached < 20
    found = [cached]
    for _ in range(4):  # each time the first page that is damaged is found out, and written anew
        push_out(served)
        answer, cached, _ = ask(served, prompt(21))
        assert answer == greedy(prompt(21), COUNT)
        found.append(cached)
    assert found == sorted(found) and found[-1] == 20


@both
@pytest.mark.parametrize("where", ["append", "get", "worth"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_page_that_cannot_come_back_leaves_the_request_waiting(tmp_path, monkeypatch, design, where, error):
    served = tiered(tmp_path, "memory", design)
    ask(served, prompt(21), likeliest(1))
    push_out(served)
    served.add_request("a", prompt(21), likeliest(COUNT))
    (waiting,) = served.scheduler.waiting

    def fail(*arguments):
        raise error("no room")

    with monkeypatch.context() as patch:
        if where == "append":
            patch.setattr(type(waiting.table), "append", fail)
        else:
            patch.setattr(served.prefix.tiers, where, fail)
        with pytest.raises(error):
            served.step()
    served.check_invariants()
    assert waiting.table.frames == [] and served.cache.pool.num_used == 0
    assert finish(served).tokens["a", 0] == greedy(prompt(21), COUNT)


@both
@pytest.mark.parametrize("broken", range(3))
def test_a_sequence_that_cannot_come_back_from_host_memory_takes_nothing(tmp_path, monkeypatch, design, broken):
    """Kept pages have to leave for it, and the tier that they go to fails at one of them."""
    served = tiered(tmp_path, "memory", design, num_pages=12, preemption="swap")
    served.add_request("a", prompt(21), likeliest(COUNT))
    (first,) = served.step()
    served.scheduler.preempt(served.scheduler.running[0])
    (swapped,) = served.scheduler.waiting
    served.scheduler.policy.admit(swapped)  # held back until the pool is full
    served.add_request("b", prompt(47), likeliest(1))
    served.step()
    served.scheduler.policy.preempt(swapped)
    assert (served.cache.pool.num_idle, served.cache.swap_pool.num_used) == (11, 6)
    put, calls = served.prefix.tiers.put, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > broken:
            raise RuntimeError("no memory")
        put(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(served.prefix.tiers, "put", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            served.step()
    served.check_invariants()
    assert served.cache.pool.num_used == served.cache.swap_pool.num_used == 0
    assert (first.token_id, *finish(served).tokens["a", 0]) == greedy(prompt(21), COUNT)


def test_clearing_forgets_all_tiers(tmp_path):
    served = tiered(tmp_path, "memory, then file")
    ask(served, prompt(21), likeliest(1))
    push_out(served)
    assert served.prefix.clear() == 0
    assert ask(served, prompt(21), likeliest(1)) == (greedy(prompt(21), 1), 0, 21)
    assert served.prefix.tiers.file is None, "it names the model that was"


def test_the_policy_that_is_given_chooses():
    """Fifo gives the page up that came first, Lru that which was used longest ago."""
    left = {}
    for policy in (Fifo, Lru):
        served = engine(8, 4, prefix_cache="hash", eviction=policy())
        for text in (prompt(13), prompt(14), prompt(13)):
            ask(served, text, likeliest(1))
        ask(served, prompt(15), likeliest(1))
        served.add_request("a", prompt(13), likeliest(1))
        left[policy] = served.prefix.num_matching(served.scheduler.waiting[0])
    assert left == {Fifo: 4, Lru: 12}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"second_tier": SecondTier()}, ValueError, "prefix_cache"),
        ({"prefix_cache": "hash", "second_tier": SecondTier()}, ValueError, "num_swap_pages"),
        ({"prefix_cache": "hash", "second_tier": 5}, TypeError, "second_tier is a SecondTier, got 5"),
        ({"prefix_cache": "hash", "num_swap_pages": 4, "second_tier": SecondTier(machine())}, NotOnThisMachine, "64"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        engine(**options)
    with pytest.raises(NotOnThisMachine, match="disk_read"):
        tier = SecondTier(machine(disk=0), tmp_path / "pages", 4)
        Engine(copy.deepcopy(models()[1]).float(), 8, 4, prefix_cache="hash", second_tier=tier)
