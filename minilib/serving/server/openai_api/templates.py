"""Chat templates: how a checkpoint writes messages as one text, in Jinja, in a file beside its tokenizer.

A template comes with a checkpoint, so it is somebody else's program: it runs in Jinja's sandbox, and sees nothing but
strings, lists and dictionaries.

Source: the environment is that of transformers' `apply_chat_template`, which templates are written for.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilib.model.stored.files import read_json

TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class InvalidTemplate(ValueError):
    """The chat template of a checkpoint is no template; the message says why."""


class CannotRender(ValueError):
    """The template refuses these messages, or cannot write them; the message is the template's."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template, compiled.

    Args:
        source: the template.
        special_tokens: variables that it may use, such as bos_token.

    Raises:
        InvalidTemplate: if it is no Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, Any] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.source, self.special_tokens = source, dict(special_tokens or {})
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidTemplate(f"the chat template cannot be compiled: {error}") from error

    @classmethod
    def load(cls, folder: Path | str) -> ChatTemplate | None:
        """The template of a checkpoint: chat_template.jinja, else that of tokenizer_config.json; None without one.

        Of several named ones it is the one named "default".

        Raises:
            InvalidTemplate: if it is no Jinja.
            CheckpointError: if tokenizer_config.json is no JSON.
        """
        path = Path(folder) / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        source, own_file = config.get("chat_template"), Path(folder) / "chat_template.jinja"
        if own_file.is_file():
            source = own_file.read_text(encoding="utf-8")
        if isinstance(source, list):
            source = {each.get("name"): each.get("template") for each in source}.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise InvalidTemplate(f"chat_template is a text or a list of named ones, got {type(source).__name__}")
        return cls(source, _special_tokens(config))

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Messages as one text.

        Args:
            messages: dictionaries with role and content.
            add_generation_prompt: end with what the assistant's answer begins with.

        Raises:
            CannotRender: if the template raises.
        """
        variables = {**self.special_tokens, "messages": messages, "tools": None, "documents": None}
        try:
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise CannotRender(f"the chat template refuses these messages: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            told = f"{type(error).__name__}: {error}"
            raise CannotRender(f"the chat template cannot write these messages: {told}") from error


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Texts of the special tokens that tokenizer_config.json names."""
    named = {name: _text(config[name]) for name in TOKEN_NAMES if config.get(name) is not None}
    more = config.get("extra_special_tokens")
    if isinstance(more, dict):
        named |= {name: _text(token) for name, token in more.items()}
    return named


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
