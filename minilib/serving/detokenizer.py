"""From tokens back to text, piece by piece, watching for stop strings."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import tokenizers

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
LONGEST = 4  # bytes of a character in UTF-8, and so tokens that one may be cut into
CONTEXT = 16  # the prompt's last tokens, among which one that has text of its own is looked for
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how vocabularies spell a byte of a character that they do not have

logger = logging.getLogger(__name__)


class TextStream:
    """The text of one sample as its tokens come: pieces that add up to the text of all tokens.

    A few tokens are decoded at a time: those whose text is not certain yet, behind tokens that were decoded before,
    because decoders such as SentencePiece's take a leading blank from what stands at the beginning. So the cost is
    linear. Bytes that never make a character come out as "\ufffd", as soon as they are too many to become one.

    Text is best effort: where the tokenizer fails, "\ufffd" takes the place of what it could not decode.

    Args:
        tokenizer: that of the model; None for no text at all.
        stop: strings that end the text; what may be the beginning of one is held back until that is known.
        prompt_token_ids: what stands before the text.

    Source: the context in front and waiting for whole characters are those of Hugging Face's text-generation-inference
    and vLLM (`detokenize_incrementally`).
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer | None, stop: tuple[str, ...] = (), prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []  # tokens whose text ends within a character
        self._given = 0  # characters of their text that were certain nevertheless
        self._held = ""
        if tokenizer is None:
            return
        last = list(prompt_token_ids[-CONTEXT:])
        candidates = [[token] for token in reversed(last)] + [last[-count:] for count in range(2, LONGEST + 1)]
        try:
            any(self._becomes_context(tokens) for tokens in candidates)
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            logger.warning("the end of the prompt cannot be decoded: %r", error)

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take one more token; return the text that is now certain, and whether a stop string ended it."""
        if self._tokenizer is None:
            return "", False
        try:
            if self._pending and not self._decode_alone([token_id]):
                return "", False  # within a character: it must not count as one of the character's bytes
            self._pending.append(token_id)
            text = self._certain()
        except BaseException as error:
            text = self._give_up(error)
        return self._watch(text)

    def finish(self) -> tuple[str, bool]:
        """What was held back, once nothing more comes, and whether a stop string ended it."""
        try:
            text = self._decode(self._pending)[self._given :] if self._pending else ""
        except BaseException as error:
            text = self._give_up(error)
        self._pending, self._given = [], 0
        text, stopped = self._watch(text)
        text, self._held = text + self._held, ""
        return text, stopped

    def _certain(self) -> str:
        """The text that the last token makes certain."""
        text = self._decode(self._pending)
        if text.endswith(UNFINISHED):
            if len(self._pending) < LONGEST:
                return self._rest_of(text.rstrip(UNFINISHED))
            return self._cut(text)
        piece = self._rest_of(text)
        self._becomes_context(self._pending)
        self._pending, self._given = [], 0
        return piece

    def _cut(self, text: str) -> str:
        """Let go the first pending tokens: too many follow for them to be part of a character that is not finished."""
        for count in range(1, LONGEST):
            first, rest = (self._decode(part) for part in (self._pending[:count], self._pending[count:]))
            # Between two of the decoder's characters, or before bytes that make one without what is in front of them.
            if first + rest == text or not rest.endswith(UNFINISHED):
                break
        else:
            count, first = 1, self._decode(self._pending[:1])
        piece, tokens = self._rest_of(first), self._pending[count:]
        self._pending, self._given = [], 0
        for token in tokens:
            self._pending.append(token)
            piece += self._certain()
        return piece

    def _rest_of(self, text: str) -> str:
        """What of the pending tokens' text is new."""
        piece, self._given = text[self._given :], max(self._given, len(text))
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode([*self._context, *tokens])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._tokenizer.decode(tokens)  # bytes that are no text spoilt the bytes in front of them

    def _decode_alone(self, tokens: list[int]) -> str:
        """The text of tokens without others around them, twice if that is a blank, which decoders take away; "" for
        what adds nothing to any text, such as an end token."""
        return self._tokenizer.decode(tokens) or self._tokenizer.decode(2 * tokens)

    def _becomes_context(self, tokens: list[int]) -> bool:
        """Put these tokens in front of those to come, if they have a text of their own.

        A decoder joins neighbouring bytes, and one that is no text then spoils all: bytes are the last choice.
        """
        if not tokens or self._context and _BYTE.fullmatch(self._tokenizer.id_to_token(tokens[-1]) or ""):
            return False
        text = self._tokenizer.decode(tokens)
        if UNFINISHED in text or not self._decode_alone(tokens):
            return False
        self._context, self._context_text = list(tokens), text
        return True

    def _give_up(self, error: BaseException) -> str:
        logger.warning("tokens %s cannot be decoded: %r", self._pending, error)
        self._pending, self._given = [], 0
        return UNFINISHED

    def _watch(self, text: str) -> tuple[str, bool]:
        """Look for stop strings with this text added, and release what is no beginning of one."""
        self._held += text
        ends = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if ends:
            text, self._held = self._held[: min(ends)], ""
            return text, True
        sure = len(self._held) - self._doubtful()
        text, self._held = self._held[:sure], self._held[sure:]
        return text, False

    def _doubtful(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop):
                return length
        return 0
