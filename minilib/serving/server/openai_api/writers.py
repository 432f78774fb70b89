"""How answers are written: whole ones as a dictionary, streams as events whose bytes are put together from parts.

A stream's chunk differs from the last one in its text alone, so what stands around the text is made once for a request.
"""

from __future__ import annotations

import json
import time
import uuid
from json.encoder import encode_basestring_ascii
from typing import Any

from minilib.serving.request import TokenOutput
from minilib.serving.server.openai_api.logprobs import TextPlace, TokenTexts, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON document."""
    return f"data: {json.dumps(document)}\n\n".encode()


class Usage:
    """Tokens of one request of HTTP.

    Args:
        prompt_tokens: of all its prompts.
    """

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = self.cached_tokens = 0

    def document(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Writer:
    """What completions and chats have in common.

    Args:
        model: name of the model.
        texts: of its tokens.
        logprobs: write those of each token.
        include_usage: every chunk of a stream says that the usage is still to come.
        prompts: what each choice's text begins with, for `echo`; one for each choice.
    """

    kind, chunk_kind, prefix = "", "", ""

    def __init__(
        self, model: str, texts: TokenTexts, logprobs: bool, include_usage: bool, prompts: list[str] | None = None
    ) -> None:
        self.texts, self.logprobs, self._prompts = texts, logprobs, prompts
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._places: dict[int, TextPlace] = {}  # of the choices that have begun
        head = json.dumps({**self._head, "object": self.chunk_kind})[:-1]
        self._before = f'data: {head}, "choices": [{{"index": '
        self._after = "]" + (', "usage": null' if include_usage else "") + "}\n\n"

    def whole(self, choices: list[list[TokenOutput]], usage: Usage) -> dict[str, Any]:
        """An answer that is not streamed.

        Args:
            choices: outputs of each choice.
            usage: of the request.
        """
        written = [self._choice(index, outputs) for index, outputs in enumerate(choices)]
        return {**self._head, "object": self.kind, "choices": written, "usage": usage.document()}

    def chunk(self, index: int, outputs: list[TokenOutput], usage: Usage | None = None) -> bytes:
        """Events for outputs of one choice, with the usage so far if it is given; none while text is held back."""
        after = self._after if usage is None else f'], "usage": {json.dumps(usage.document())}}}\n\n'
        text, reason = "".join([output.text for output in outputs]), outputs[-1].finish_reason
        first = ""
        if index not in self._places:
            first, self._places[index] = self._first(index), TextPlace(self.texts)
        if not (text or reason or self.logprobs):
            return first.encode()
        logprobs = json.dumps(self._logprobs(outputs, self._places[index])) if self.logprobs else "null"
        ended = f'"{reason}"' if reason else "null"
        piece = self._piece(encode_basestring_ascii(text))
        return (first + self._event(index, piece, logprobs, ended, after)).encode()

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last event before the end, without choices."""
        return event({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage.document()})

    def _logprobs(self, outputs: list[TokenOutput], place: TextPlace) -> dict[str, Any]:
        raise NotImplementedError

    def _first(self, index: int) -> str:
        """Events in front of a choice's first."""
        raise NotImplementedError

    def _piece(self, quoted: str) -> str:
        """The member of a chunk's choice that holds text, which is given as JSON."""
        raise NotImplementedError

    def _choice(self, index: int, outputs: list[TokenOutput]) -> dict[str, Any]:
        raise NotImplementedError

    def _event(
        self, index: int, piece: str, logprobs: str = "null", ended: str = "null", after: str | None = None
    ) -> str:
        end = self._after if after is None else after
        return f'{self._before}{index}, {piece}, "logprobs": {logprobs}, "finish_reason": {ended}}}{end}'


class CompletionWriter(Writer):
    """Answers of /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _logprobs(self, outputs: list[TokenOutput], place: TextPlace) -> dict[str, Any]:
        return completion_logprobs(outputs, self.texts, place)

    def _first(self, index: int) -> str:
        return self._event(index, self._piece(json.dumps(self._prompts[index]))) if self._prompts else ""

    def _piece(self, quoted: str) -> str:
        return f'"text": {quoted}'

    def _choice(self, index: int, outputs: list[TokenOutput]) -> dict[str, Any]:
        text = "".join(output.text for output in outputs)
        return {
            "index": index,
            "text": (self._prompts[index] if self._prompts else "") + text,
            "logprobs": self._logprobs(outputs, TextPlace(self.texts)) if self.logprobs else None,
            "finish_reason": outputs[-1].finish_reason,
        }


class ChatWriter(Writer):
    """Answers of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _logprobs(self, outputs: list[TokenOutput], place: TextPlace) -> dict[str, Any]:
        return chat_logprobs(outputs, self.texts)

    def _first(self, index: int) -> str:
        return self._event(index, '"delta": {"role": "assistant", "content": ""}')

    def _piece(self, quoted: str) -> str:
        return f'"delta": {{"content": {quoted}}}'

    def _choice(self, index: int, outputs: list[TokenOutput]) -> dict[str, Any]:
        text = "".join(output.text for output in outputs)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(outputs, TextPlace(self.texts)) if self.logprobs else None,
            "finish_reason": outputs[-1].finish_reason,
        }
