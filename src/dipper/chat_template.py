"""A model's chat template: Jinja that came with the weights, so it is untrusted and runs in a sandbox.

Templates are written for the environment that transformers gives them; what they count on is rebuilt here: white space
control, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, `break` / `continue`, and `{% generation %}`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """One template, compiled when it is first used: jinja2 is memory that a plain completion need not hold."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        self._source = source
        self._names = {"bos_token": bos_token, "eos_token": eos_token}
        self._template: Template | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """Render messages.

        Raises:
            ConfigError: the template is invalid, or the messages are malformed or refused by it.
        """
        _check(messages)
        if self._template is None:
            self._template = self._compile()
        names: dict[str, Any] = {"tools": None, "documents": None, **self._names, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # a template may fail in any way that Python can
            raise ConfigError(
                f"the chat template refuses these {len(messages)} messages ({_one_line(error)}): change the messages "
                f"(roles here: {', '.join(m['role'] for m in messages[:8])}) or give a prompt"
            ) from error

    def _compile(self) -> Template:
        try:
            return _environment().from_string(self._source)
        except Exception as error:  # jinja2 raises more than TemplateSyntaxError, RecursionError for one
            raise ConfigError(
                f"the model's chat template is invalid ({_one_line(error)}): give a prompt, or correct "
                "chat_template.jinja"
            ) from error


def _check(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError(f"messages is {_shown(messages)}: give a list with at least one {{'role', 'content'}}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ConfigError(f"message {index} is {_shown(message)}: each is an object with 'role' and 'content'")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise ConfigError(f"message {index} has the role {_shown(message.get('role'))}: give a name such as 'user'")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise ConfigError(f"message {index} has the content {_shown(message['content'])}: give text")


def _environment() -> Environment:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a trainer scores; for us its body is all there is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
