"""The models that every engine loads: two of random weights, and the one that comes with the library."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import PreTokenizer, Split, WhitespaceSplit

from minilib.model import weights
from minilib.model.config import ModelConfig
from minilib.model.decoder import Decoder
from tools.bench.paging import BIG, MODEL

RANDOM = {"small": MODEL, "big": BIG}
NAMES = (*RANDOM, "shipped")
SPREAD = 4  # times the usual spread of a new layer's weights: without it, tied tables repeat the last token for ever


def save(name: str, folder: Path) -> Decoder:
    """Write one model to folder/hf, fp32, with a tokenizer of one word a token, which converters ask for; return it."""
    model = weights.load(weights.PRETRAINED) if name == "shipped" else random_model(RANDOM[name])
    write(model, folder)
    return model


def write(model: Decoder, folder: Path) -> None:
    """Write a model to folder/hf as `save` does."""
    weights.save(model, folder / "hf", torch.float32, eos_token_ids=[0])
    words = [f"t{token}" for token in range(model.config.vocab_size)]
    _write_tokenizer(words, WhitespaceSplit(), None, folder)


def letters(vocab_size: int) -> list[str]:
    """A letter for each token, by its id, that no tokenizer normalises: of a block of ideographs beyond 16 bits."""
    return [chr(0x20000 + token) for token in range(vocab_size)]


def write_with_letters(model: Decoder, folder: Path) -> None:
    """As `write`, with a letter for each token: servers are sent texts, and all tokenizers cut these alike."""
    write(model, folder)
    _write_tokenizer(letters(model.config.vocab_size), Split(Regex("."), "isolated"), decoders.Fuse(), folder)


def _write_tokenizer(
    words: list[str], pre_tokenizer: PreTokenizer, decoder: decoders.Decoder | None, folder: Path
) -> None:
    tokenizer = Tokenizer(tokenizer_models.WordLevel({word: token for token, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.save(str(folder / "hf" / "tokenizer.json"))
    special = {f"{which}_token": words[0] for which in ("unk", "bos", "eos")}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "hf" / "tokenizer_config.json").write_text(json.dumps(described))


def random_model(config: ModelConfig) -> Decoder:
    """Weights of a fixed seed whose greedy tokens vary and do not tie."""
    torch.manual_seed(0)
    model = Decoder(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            elif name.startswith("layers"):
                parameter *= SPREAD
    return model


@torch.inference_mode()
def first_difference(model: Decoder, prompt: list[int], ours: list[int], theirs: list[int]) -> dict | None:
    """Where two continuations part, and how far apart the model's logits of the two tokens are there.

    Returns:
        "position" among the new tokens, "logit_gap" of our token over theirs, and "logit_std" of all of them to hold it
        against; None where the two are the same.
    """
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    if place >= min(len(ours), len(theirs)):
        return {"position": place, "lengths": [len(ours), len(theirs)]}
    ids = torch.tensor([prompt + ours[:place]])
    logits = model(ids, torch.arange(ids.shape[1])[None], model.ops.causal_attention)[0, -1]
    gap = logits[ours[place]] - logits[theirs[place]]
    return {"position": place, "logit_gap": gap.item(), "logit_std": logits.std().item()}
