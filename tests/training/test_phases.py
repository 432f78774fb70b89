from contextlib import contextmanager

import torch

from minilib.model.decoder import Decoder
from minilib.training.phases import PHASES
from minilib.training.trainer import Trainer
from tests.training.test_trainer import HELD_OUT, ROW, SHAPE, SHORT, changed


def told(accumulate: int, steps: int) -> tuple[list[str], Trainer]:
    events = []

    @contextmanager
    def note(name):
        events.append(name)
        yield
        events.append(f"/{name}")

    config = changed(SHORT, accumulate=accumulate, steps=steps, evaluate_every=100)
    run = Trainer(Decoder(SHAPE), ROW, HELD_OUT, config, phases=note)
    run.run()
    return events, run


def test_a_step_tells_its_phases_in_order_and_none_lies_in_another():
    events, run = told(accumulate=1, steps=2)
    assert events == [event for name in PHASES for event in (name, f"/{name}")] * 2
    assert len(run.grad_norms) == 2 and all(norm > 0 for norm in run.grad_norms)


def test_forward_and_backward_are_told_once_for_each_part_of_a_batch():
    events, _ = told(accumulate=3, steps=1)
    assert [event for event in events if not event.startswith("/")] == [
        "data", *["forward", "backward"] * 3, "gradients", "optimizer", "loss",
    ]  # fmt: skip


def test_who_listens_changes_nothing():
    torch.manual_seed(0)
    listened = told(accumulate=1, steps=3)[1]
    torch.manual_seed(0)
    alone = Trainer(Decoder(SHAPE), ROW, HELD_OUT, listened.config)
    alone.run()
    assert alone.losses == listened.losses


def test_a_bar_is_shown_unless_it_is_not_wanted(capfd):
    told(accumulate=1, steps=1)
    assert "training" in capfd.readouterr().err
    Trainer(Decoder(SHAPE), ROW, HELD_OUT, SHORT).run(until=1, bar=False)
    assert capfd.readouterr().err == ""
