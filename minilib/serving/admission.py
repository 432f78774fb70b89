"""What an engine takes: models whose requests do not depend on each other, and requests that can be finished."""

from __future__ import annotations

from collections.abc import Sequence as Row

from minilib.mechanisms.basics.checks import is_whole
from minilib.model.config import ModelConfig
from minilib.serving.request import InvalidRequest, SamplingParams, token_ids_of


def check_independence(config: ModelConfig) -> None:
    """Refuse a model whose answer to one request depends on the others in its batch.

    Raises:
        ValueError: for a mixture of experts that drops tokens, or whose experts choose.
    """
    moe = config.moe
    if moe and (moe.choice == "expert" or moe.capacity_factor is not None):
        raise ValueError(
            f"this model's answers depend on who else is in the batch (choice={moe.choice!r}, capacity_factor="
            f"{moe.capacity_factor}); serve it with choice='token' and capacity_factor=None"
        )


def check_request(
    prompt: list[int], params: SamplingParams, config: ModelConfig, num_slots: int, max_sequences: int, text: bool
) -> None:
    """Refuse what cannot be served, however long it waits.

    Args:
        prompt: token ids.
        params: what is asked for.
        config: of the model.
        num_slots: tokens that the whole KV cache holds.
        max_sequences: most sequences that run at once.
        text: whether there is a tokenizer.

    Raises:
        InvalidRequest: saying what is too much or missing.
    """
    if not prompt:
        raise InvalidRequest("the prompt is empty; give at least one token id")
    token_ids_of(params.stop_token_ids, config.vocab_size, "stop_token_ids")
    if len(prompt) >= config.max_position:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, and the model takes at most {config.max_position}, the generated "
            "included"
        )
    if len(prompt) > num_slots:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens, and the whole KV cache holds {num_slots}; give the engine more pages"
        )
    if params.n > max_sequences:
        raise InvalidRequest(f"n is {params.n}, and max_sequences is {max_sequences}")
    if (params.logprobs or 0) > config.vocab_size:
        raise InvalidRequest(f"logprobs is {params.logprobs}, and the model knows {config.vocab_size} tokens")
    if params.stop and not text:
        raise InvalidRequest("stop strings need text: give the engine a tokenizer, or use stop_token_ids")


def end_tokens(given: int | Row[int] | None, vocab_size: int) -> frozenset[int]:
    """The tokens that end a sequence, none for None.

    Raises:
        ValueError: if one is no token id of the model.
    """
    if given is None:
        return frozenset()
    try:
        return frozenset(token_ids_of([given] if is_whole(given) else given, vocab_size, "eos_token_id"))
    except InvalidRequest as error:
        raise ValueError(f"eos_token_id={given!r}: {error}") from error
