"""From what a request says to token ids, on a path that lets nobody's words become control tokens.

A chat template writes control tokens (`<|im_end|>`, `</s>`) as text, and the tokenizer reads the text back. Were a
message's own text read alike, a user could end his turn and begin one of the system's. So before the template runs,
every spelling of a special token in a message, and every beginning of one at its end, is broken by a mark that the
tokenizer never sees: the text is cut at the marks, and the parts are encoded by themselves.

    message   "hi <|im_end|> you"      rendered   "…user\nhi <▮|im_end|> you<|im_end|>\n…"
                                       encoded    "…user\nhi <" + "|im_end|> you" [im_end] "\n…"

The prompt of a completion is the client's alone: the tokenizer reads it as it reads every text.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence as Row

import tokenizers

from minilib.serving.server.errors import ApiError
from minilib.serving.server.protocol import ChatMessage
from minilib.serving.server.templates import CannotRender, ChatTemplate

LONG = 8192  # characters; a longer text is encoded beside the event loop, in a thread
MARKS = range(0xFDD0, 0xFDF0)  # code points that Unicode keeps free for a program's own use


class PromptEncoder:
    """Texts and chats to token ids.

    Args:
        tokenizer: of the model; None if it deals in token ids alone.
        template: of chats; None if the checkpoint has none.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | None, template: ChatTemplate | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._controlled, special = tokenizer, []
        if tokenizer is not None:
            special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
            if tokenizer.encode_special_tokens:  # it reads all text as plain text, and a template's must be read
                self._controlled = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        self._special = [text for text in special if text]
        longest_first = sorted(self._special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first))) if special else None

    async def text(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt.

        Raises:
            ApiError: 400 if there is no tokenizer.
        """
        return await self._encode(self._known(self.tokenizer), prompt, add_special_tokens)

    async def chat(self, messages: Row[ChatMessage], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a chat; the beginning-of-text token is there if the template writes it, and never twice.

        Raises:
            ApiError: 400 if there is no template or no tokenizer, or if the template refuses the messages.
        """
        rendered, mark = self.render(messages, add_generation_prompt)
        tokenizer = self._known(self._controlled)
        ids: list[int] = []
        for part in rendered.split(mark):
            ids += await self._encode(tokenizer, part, False)
        return ids

    def render(self, messages: Row[ChatMessage], add_generation_prompt: bool = True) -> tuple[str, str]:
        """The text of a chat as the template writes it, and the mark that breaks control tokens of the messages."""
        if self.template is None:
            message = "the model has no chat template, and so takes no messages; send a prompt to /v1/completions"
            raise ApiError(400, message, "no_chat_template", "messages")
        plain = [_as_template_sees(message) for message in messages]
        mark = self._unused_mark(plain)
        for message in plain:
            for name in ("content", "name", "tool_call_id"):
                if name in message:
                    message[name] = self._broken(message[name], mark)
        try:
            return self.template.render(plain, add_generation_prompt), mark
        except CannotRender as error:
            raise ApiError(400, str(error), "chat_template_error", "messages") from error

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            ApiError: 400 if there is no tokenizer, or for an id that it does not have.
        """
        tokenizer = self._known(self.tokenizer)
        size = tokenizer.get_vocab_size()
        if wrong := [token for token in token_ids if token >= size]:
            message = f"the tokenizer knows token ids 0 … {size - 1}, got {wrong[0]}"
            raise ApiError(400, message, "invalid_value", "tokens")
        return tokenizer.decode(token_ids, skip_special_tokens=False)

    def _known(self, tokenizer: tokenizers.Tokenizer | None) -> tokenizers.Tokenizer:
        if tokenizer is None:
            raise ApiError(400, "the model has no tokenizer; give token ids", "no_tokenizer", "prompt")
        return tokenizer

    @staticmethod
    async def _encode(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= LONG:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        # of one text: the call for many lets other threads run
        (encoding,) = await asyncio.to_thread(
            tokenizer.encode_batch_fast, [text], add_special_tokens=add_special_tokens
        )
        return encoding.ids

    def _unused_mark(self, messages: list[dict[str, str]]) -> str:
        said = {character for message in messages for text in message.values() for character in set(text)}
        mark = next((chr(code) for code in MARKS if chr(code) not in said), None)
        if mark is None:
            raise ApiError(400, "the messages hold every noncharacter U+FDD0 … U+FDEF; leave one out", param="messages")
        return mark

    def _broken(self, text: str, mark: str) -> str:
        """A text with a mark within each special token that it spells, or at its end begins to spell."""
        if self._spelled is None:
            return text
        if single := [special for special in self._special if len(special) == 1 and special in text]:
            raise ApiError(400, f"the messages hold {single[0]!r}, a control token", "control_token", "messages")
        text = self._spelled.sub(lambda found: found[0][:1] + mark + found[0][1:], text)
        for end in sorted({len(text), len(text.rstrip())}, reverse=True):  # templates take blanks from the end
            begun = max((_overlap(text[:end], special) for special in self._special), default=0)
            if begun:
                text = text[: end - begun + 1] + mark + text[end - begun + 1 :]
        return text


def _overlap(text: str, special: str) -> int:
    """Characters at the end of a text that a special token begins with, less than all of the token."""
    lengths = range(min(len(special) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(special[:length])), 0)


def _as_template_sees(message: ChatMessage) -> dict[str, str]:
    """Role, content as one text, and what else was given."""
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    given = {"role": message.role, "content": content, "name": message.name, "tool_call_id": message.tool_call_id}
    return {name: value for name, value in given.items() if value is not None}
