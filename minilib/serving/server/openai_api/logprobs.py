"""Log-probabilities of tokens as the two endpoints write them."""

from __future__ import annotations

import codecs
import functools
import json
from typing import Any

import tokenizers

from minilib.serving.request import TokenOutput

LEAST = -9999.0  # what OpenAI's API writes for a token that has no chance; JSON has no −inf


@functools.cache
def _byte_of() -> dict[str, int]:
    """Bytes by the characters that byte-level vocabularies spell them with: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


class TokenTexts:
    """Spellings of tokens, each alone.

    Args:
        tokenizer: of the model; None to write ids.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._byte_level = tokenizer is not None and "ByteLevel" in json.dumps(
            json.loads(tokenizer.to_str())["decoder"]
        )
        added = tokenizer.get_added_tokens_decoder() if tokenizer else {}
        self._added, self._control = set(added), {token_id for token_id, token in added.items() if token.special}
        self.of = functools.lru_cache(maxsize=2**16)(self._of)

    def _of(self, token_id: int) -> tuple[str, list[int]]:
        """The text of a token, "bytes:\\x.." where its bytes are no text, and its bytes in UTF-8."""
        raw = self._bytes(token_id)
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    def in_text(self, token_id: int) -> bytes:
        """What a token adds to a text, which a control token does not, nor any without a tokenizer."""
        return b"" if self._tokenizer is None or token_id in self._control else self._bytes(token_id)

    def _bytes(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return f"token_id:{token_id}".encode()
        spelling = self._tokenizer.id_to_token(token_id)
        if spelling is None:
            return b""
        if token_id in self._added:
            return spelling.encode()
        if self._byte_level:
            return bytes(_byte_of()[character] for character in spelling)
        if len(spelling) == 6 and spelling.startswith("<0x") and spelling.endswith(">"):
            return bytes([int(spelling[3:5], 16)])
        return spelling.replace("▁", " ").encode()


class TextPlace:
    """Where the next token of one text begins, whatever of the text has been handed out: characters that are whole.

    Args:
        texts: of the model.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._decoder, self.offset = texts, codecs.getincrementaldecoder("utf-8")("replace"), 0

    def pass_by(self, token_id: int) -> None:
        """One more token stands in front."""
        self.offset += len(self._decoder.decode(self._texts.in_text(token_id)))


def chat_logprobs(outputs: list[TokenOutput], texts: TokenTexts) -> dict[str, Any]:
    """What /v1/chat/completions writes about tokens."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text, raw = texts.of(token_id)
        return {"token": text, "logprob": _number(logprob), "bytes": raw}

    content = [
        entry(output.token_id, output.logprob) | {"top_logprobs": [entry(*each) for each in output.top_logprobs]}
        for output in outputs
        if output.token_id is not None
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(outputs: list[TokenOutput], texts: TokenTexts, place: TextPlace) -> dict[str, Any]:
    """What /v1/completions writes about tokens.

    Args:
        outputs: of one sample.
        texts: of the model.
        place: where the first of them begins; it moves behind the last.
    """
    written: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for output in outputs:
        if output.token_id is not None:
            text, logprob = texts.of(output.token_id)[0], _number(output.logprob)
            likely = {texts.of(token)[0]: _number(value) for token, value in output.top_logprobs}
            written["tokens"].append(text)
            written["token_logprobs"].append(logprob)
            written["top_logprobs"].append(likely | {text: logprob})  # OpenAI's API always has the chosen one
            written["text_offset"].append(place.offset)
            place.pass_by(output.token_id)
    return written


def _number(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
