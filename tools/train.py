"""Train the checkpoint that ships with the library, minilib/model/pretrained/, and record the run.

Usage: python -m tools.train [--threads N] [--steps N]

Stopping it loses a hundred steps at most: the same command goes on. The corpus is the standard library of the Python
that runs this, so another version of Python gives another model; the record says which it was.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from minilib.model import corpus, tokenizer, weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from minilib.numbers import records
from minilib.numbers.machine import Machine
from minilib.training.trainer import TrainConfig, Trainer

MODEL = ModelConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position=1024,
    qk_norm=True,
)
RUN = records.ROOT / "build" / "train.pt"
SAVE_EVERY = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads; all if left out")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (4000)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = TrainConfig(steps=options.steps, batch_size=8, context=512, learning_rate=2e-3, precision="bf16")
    source = corpus.standard_library()
    words = tokenizer.train(source.train, MODEL.vocab_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [torch.tensor(tokenizer.encode_all(words, texts)) for texts in (source.train, source.validation)]
    trainer = Trainer(Decoder(MODEL).to(device), *rows, config)
    RUN.parent.mkdir(exist_ok=True)
    if RUN.is_file():
        trainer.resume(RUN)
        print(f"going on from step {trainer.step}")
    trainer.run(after_step=_save)
    folder = weights.PRETRAINED
    model_file = weights.save(trainer.model, folder)
    words.save(str(folder / "tokenizer.json"))
    _record(trainer, source, len(rows[0]), model_file)
    return 0


def _save(trainer: Trainer) -> None:
    if trainer.step % SAVE_EVERY == 0 or trainer.step == trainer.config.steps:
        trainer.save(RUN)


def _record(trainer: Trainer, source: corpus.Corpus, train_tokens: int, model_file: Path) -> None:
    machine = Machine.measure()
    every = max(1, len(trainer.losses) // 200)
    data = {
        "model": asdict(MODEL),
        "training": asdict(trainer.config),
        "parameters": MODEL.num_parameters,
        "corpus_sha256": source.digest,
        "train_tokens": train_tokens,
        "tokens_seen": trainer.step * trainer.config.batch_size * trainer.config.context,
        "losses": [(k, sum(trainer.losses[k : k + every]) / every) for k in range(0, len(trainer.losses), every)],
        "validation_losses": trainer.validation_losses,
        "seconds": trainer.seconds,
        "threads": torch.get_num_threads(),
        "bytes": model_file.stat().st_size,
    }
    path = records.stamp("training", data, machine.title).save(machine.name)
    print(f"wrote {model_file.relative_to(records.ROOT)} ({model_file.stat().st_size / 1e6:.1f} MB)")
    print(f"recorded {path.relative_to(records.ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
