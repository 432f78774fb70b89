"""From tokens back to text, piece by piece, watching for stop strings."""

from __future__ import annotations

import tokenizers
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one sample as its tokens come.

    Args:
        tokenizer: that of the model.
        stop: strings that end the text; what may be the beginning of one is held back until that is known.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._held = ""
        self._unfinished: list[int] = []  # tokens of a character whose bytes are not all there

    def push(self, token_id: int) -> tuple[str, bool]:
        """Take one more token; return the text that is now certain, and whether a stop string ended it."""
        text = self._stream.step(self._tokenizer, token_id)  # None in the middle of a character
        self._unfinished = [] if text else [*self._unfinished, token_id]
        self._held += text or ""
        ends = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if ends:
            text, self._held = self._held[: min(ends)], ""
            return text, True
        return self._release(len(self._held) - self._doubtful()), False

    def rest(self) -> str:
        """What was held back, once nothing more comes; � for a character that was not finished."""
        self._held += self._tokenizer.decode(self._unfinished)
        self._unfinished = []
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _doubtful(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop):
                return length
        return 0
