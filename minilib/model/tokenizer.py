"""Byte-level BPE, trained with the `tokenizers` library on the corpus; any text survives encoding and decoding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minilib.model.stored.files import CheckpointError, read_json

END = "<|end|>"  # stands between texts; the model writes it when it considers a file finished


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learn the merges of byte pairs that make these texts short.

    Args:
        texts: what to learn from.
        vocab_size: tokens in all, at least 257: every byte and `END`.

    Raises:
        ValueError: if the vocabulary cannot hold every byte.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, one token per byte and {END}; got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load(folder: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json from a checkpoint's folder.

    Raises:
        FileNotFoundError: if it has none.
        CheckpointError: if it is a Git LFS pointer, empty, cut, or of a version that `tokenizers` does not read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"the checkpoint {Path(folder).name} has no tokenizer.json; pass token ids instead")
    read_json(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        # The library raises Exception itself, and for some files Rust's panic, which is a BaseException.
        raise CheckpointError(
            f"tokenizers {tokenizers.__version__} cannot read tokenizer.json of {Path(folder).name}: {error}; "
            "download it anew, or install the version of tokenizers that wrote it"
        ) from error
    tokenizer.encode_special_tokens = tokenizer.token_to_id(END) is not None
    return tokenizer


def encode_all(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> list[int]:
    """Token ids of all texts in one row, each followed by `END`."""
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no {END}; train it with minilib.model.tokenizer.train")
    row: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        row += [*encoding.ids, end]
    return row
