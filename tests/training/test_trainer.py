import math
import re
import warnings

import pytest
import torch
from torch.nn import functional as F

from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.model.moe.config import MoEConfig
from minilib.model.ops import causal_attention
from minilib.training.batches import batches_of
from minilib.training.expert_balance import BalanceConfig
from minilib.training.trainer import CannotResume, TrainConfig, Trainer

SHAPE = ModelConfig(31, 16, 24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64)
SHORT = TrainConfig(steps=6, batch_size=3, context=8, warmup=2, evaluate_every=2, validation_batches=2)
ROW = torch.randint(31, (200,), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(31, (100,), generator=torch.Generator().manual_seed(1))


def changed(config, **changes):
    return type(config)(**{**config.__dict__, **changes})


def trainer(config=SHORT, shape=SHAPE, train=ROW, validation=HELD_OUT) -> Trainer:
    return Trainer(Decoder(shape), train, validation, config)


def windows(row, step, config=SHORT) -> torch.Tensor:
    """What one process trains on in a step."""
    starts = batches_of(len(row), config, rank=0, world_size=1).draw(step).starts
    return torch.stack([row[start : start + config.context + 1] for start in starts])


def weights(of: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_falls_from_knowing_nothing_to_knowing_the_pattern():
    row = torch.arange(7).repeat(60)
    config = changed(SHORT, steps=120, learning_rate=1e-2, warmup=5, evaluate_every=40)
    run = trainer(config, train=row, validation=row)
    run.run()
    assert run.losses[0] == pytest.approx(math.log(31), abs=0.1)  # every token as likely
    assert run.losses[-1] < 0.1
    assert [step for step, _ in run.validation_losses] == [40, 80, 120]
    assert run.validation_losses[-1][1] < 0.1
    assert (run.step, len(run.losses)) == (120, 120)
    assert run.tokens_per_second > 0


def test_the_biases_of_a_mixture_move_less_as_the_learning_rate_falls():
    shape = changed(SHAPE, moe=MoEConfig(num_experts=4, top_k=1, intermediate_size=8))
    config, biases = changed(SHORT, balance=BalanceConfig("bias", rate=1.0)), [torch.zeros(4)]
    run = trainer(config, shape)
    run.run(after_step=lambda run: biases.append(run.model.layers[0].moe.router.bias.clone()))
    for step in range(config.steps):
        moved = (biases[step + 1] - biases[step]).abs()
        rate = config.rate(step) / config.learning_rate  # 0.5 in warm-up, 1, then down to a tenth
        assert torch.isclose(moved[moved > 0], torch.tensor(rate), rtol=1e-5).all() and moved.any()


@pytest.mark.parametrize("clip", [1e9, 0.01], ids=["unclipped", "clipped"])
def test_steps_are_those_of_adamw_written_out(clip):
    """Kingma and Ba 2015, Loshchilov and Hutter 2019, on gradients of a loss that is written out as well."""
    config = changed(SHORT, clip=clip, weight_decay=0.3, learning_rate=1e-2)
    run, model = trainer(config), Decoder(SHAPE)
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in model.named_parameters()}
    for step in range(3):
        batch = windows(ROW, step, config)
        logits = model(batch[:, :-1], torch.arange(8).expand(3, 8), causal_attention)
        chosen = logits.log_softmax(-1).gather(-1, batch[:, 1:, None])
        loss = -chosen.mean()
        model.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        shrink = min(1.0, clip / (norm.item() + 1e-6))
        assert (shrink < 1) == (clip < 1)
        rate = [0.005, 0.01, 0.01][step]  # two steps of warm-up, and the peak
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = moments[name]
                first += (1 - 0.9) * (p.grad * shrink - first)
                second += (1 - 0.95) * ((p.grad * shrink).square() - second)
                if p.dim() > 1 and not name.startswith("embed"):
                    p *= 1 - rate * 0.3
                p -= rate * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        run.run(until=step + 1)
        assert run.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(run.model.state_dict()[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_first_weights_equal_a_plain_torch_loop_bit_for_bit():
    run, model = trainer(), Decoder(SHAPE)
    no_decay = [p for name, p in model.named_parameters() if "norm" in name or "embed" in name]
    decay = [p for name, p in model.named_parameters() if "norm" not in name and "embed" not in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SHORT.learning_rate / 2, betas=(0.9, 0.95))
    batch = windows(ROW, 0)
    logits = model(batch[:, :-1], torch.arange(8).expand(3, 8), causal_attention)
    F.cross_entropy(logits.reshape(-1, 31), batch[:, 1:].reshape(-1)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), SHORT.clip)
    optimizer.step()
    run.run(until=1)
    assert equal(weights(run), model.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(tied):
    """With gradients of zero a step does nothing but decay."""
    run = trainer(changed(SHORT, weight_decay=0.5, warmup=0), changed(SHAPE, tie_embeddings=tied, qk_norm=True))
    before = weights(run)
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    moved = {name for name, tensor in weights(run).items() if not torch.equal(tensor, before[name])}
    assert moved == {f"layers.0.{part}.weight" for part in ("qkv", "project", "gate_up", "down")}
    grouped = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(run.model.parameters()))
    factor = 1 - SHORT.learning_rate * 0.5
    torch.testing.assert_close(run.model.layers[0].qkv.weight.detach(), before["layers.0.qkv.weight"] * factor)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_the_run_that_was_never_stopped(stop, tmp_path):
    whole, first, second = trainer(), trainer(), trainer()
    whole.run()
    first.run(until=stop)
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    assert (second.step, second.seconds) == (stop, first.seconds)
    second.run()
    assert second.losses == whole.losses
    assert second.validation_losses == whole.validation_losses
    assert equal(weights(second), weights(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_saving_and_looking_at_the_validation_loss_change_nothing(tmp_path):
    plain, watched = trainer(), trainer(changed(SHORT, evaluate_every=1))
    plain.run()
    watched.run(after_step=lambda run: run.save(tmp_path / "run.pt"))
    assert plain.losses == watched.losses
    assert watched.validation_loss() == watched.validation_loss() == watched.validation_losses[-1][1]


def test_the_seed_decides_the_batches():
    runs = [trainer(changed(SHORT, seed=seed)) for seed in (0, 0, 1)]
    for run in runs:
        run.run(until=2)
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_batches_are_windows_of_the_row_and_reach_both_ends():
    counted = torch.arange(40)
    drawn = torch.cat([windows(counted, step) for step in range(60)])
    assert drawn.shape == (180, 9)
    assert torch.equal(drawn, drawn[:, :1] + torch.arange(9))
    assert (drawn.min(), drawn.max()) == (0, 39)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-3}, "learning_rate was 0.003, now 0.001"),
        ({"steps": 9, "seed": 4}, "steps was 6, now 9; seed was 0, now 4"),
        ({"precision": "bf16"}, "precision was 'fp32', now 'bf16'"),
    ],
)
def test_a_run_with_another_config_cannot_be_resumed(change, said, tmp_path):
    trainer().save(tmp_path / "run.pt")
    other = trainer(changed(SHORT, **change))
    with pytest.raises(CannotResume, match=f"run.pt is another run: {re.escape(said)}"):
        other.resume(tmp_path / "run.pt")


@pytest.mark.parametrize("change", [{"intermediate_size": 32}, {"num_layers": 2}, {"qk_norm": True}])
def test_a_run_with_another_model_cannot_be_resumed(change, tmp_path):
    trainer().save(tmp_path / "run.pt")
    with pytest.raises(CannotResume, match="run.pt .*(layers|gate_up|down|q_norm|intermediate_size|qk_norm)"):
        trainer(shape=changed(SHAPE, **change)).resume(tmp_path / "run.pt")


def test_a_run_may_move_to_other_kernels(tmp_path):
    first, second = trainer(), trainer(shape=changed(SHAPE, kernels="triton"))
    first.run(until=3)
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    first.run()
    second.run()
    assert second.losses == pytest.approx(first.losses, rel=1e-5)


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"norm_eps": 1e-3}, {"num_heads": 4, "head_dim": 4}])
def test_a_model_of_the_same_shapes_that_computes_something_else_cannot_be_resumed(change, tmp_path):
    shape = changed(SHAPE, num_kv_heads=1 if "head_dim" not in change else 2)
    trainer(shape=changed(SHAPE, num_kv_heads=1)).save(tmp_path / "run.pt")
    with pytest.raises(CannotResume, match="rope_theta|norm_eps|num_heads"):
        trainer(shape=changed(shape, **change)).resume(tmp_path / "run.pt")


def test_a_refused_resume_leaves_the_model_alone(tmp_path):
    saved = trainer()
    saved.run(until=3)
    saved.save(tmp_path / "run.pt")
    other = trainer(shape=changed(SHAPE, num_layers=2))
    before = weights(other)
    with pytest.raises(CannotResume):
        other.resume(tmp_path / "run.pt")
    assert equal(weights(other), before)


def test_a_run_on_other_data_cannot_be_resumed(tmp_path):
    trainer().save(tmp_path / "run.pt")
    with pytest.raises(CannotResume, match="data|train"):
        trainer(train=ROW.flip(0)).resume(tmp_path / "run.pt")


def test_the_learning_rate_at_its_corners():
    config = changed(SHORT, steps=100, warmup=10, learning_rate=1.0)
    assert [config.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])  # rises
    assert config.rate(10) == pytest.approx(1.0)
    assert config.rate(55) == pytest.approx(0.55)  # half-way between the peak and a tenth of it
    assert config.rate(100) == pytest.approx(0.1)
    rates = [config.rate(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert changed(config, warmup=0).rate(0) == pytest.approx(1.0)
    assert changed(config, warmup=200).rate(99) == pytest.approx(0.5)  # a run shorter than its warm-up
    assert changed(config, steps=10).rate(9) == pytest.approx(1.0)


def test_every_step_is_taken_at_its_rate():
    run, seen = trainer(), []
    run.run(after_step=lambda run: seen.append({group["lr"] for group in run.optimizer.param_groups}))
    assert seen == [{SHORT.rate(step)} for step in range(6)]


def test_bf16_multiplies_in_bf16_keeps_weights_in_fp32_and_warns_of_nothing():
    run, exact = trainer(changed(SHORT, precision="bf16"), changed(SHAPE, qk_norm=True)), trainer()
    seen = set()
    run.model.layers[0].qkv.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.run()
    exact.run()
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}
    assert run.losses[0] != exact.losses[0]
    assert run.losses == pytest.approx(exact.losses, rel=0.02)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_data_shorter_than_a_sequence_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} has 8 tokens; a context of 8 needs"):
        trainer(**{name: ROW[:8]})
    trainer(**{name: ROW[:10]}).run(until=1)


def test_one_sequence_and_its_next_token_are_enough():
    trainer(train=ROW[:9], validation=HELD_OUT[:9]).run()


def test_a_run_stops_where_told_and_a_finished_one_stays_finished():
    run, steps = trainer(), []
    run.run(until=2)
    assert run.step == 2
    run.run(until=99, after_step=lambda run: steps.append(run.step))
    assert steps == [3, 4, 5, 6]
    after = weights(run)
    run.run()
    assert (run.step, equal(weights(run), after)) == (6, True)


def test_until_step_zero_takes_no_step():
    run = trainer()
    run.run(until=0)
    assert run.step == 0


def test_a_run_interrupted_within_a_step_goes_on_as_if_it_had_not_been(monkeypatch):
    whole, run = trainer(), trainer()
    whole.run()
    with monkeypatch.context() as patch:
        patch.setattr(run.optimizer, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.run()
    run.run()
    assert equal(weights(run), weights(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(({name: 0}, f"{name} must be at least 1, got 0") for name in ("steps", "batch_size", "context")),
        *(({name: 0}, f"{name} must be at least 1") for name in ("evaluate_every", "validation_batches")),
        ({"precision": "fp16"}, "fp32, bf16; got 'fp16'"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"learning_rate": math.nan}, "must be positive"),
        ({"clip": 0.0}, "must be positive"),
        ({"warmup": -1}, "warmup ≥ 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        changed(SHORT, **change)
