"""A model's chat template: Jinja, rendered in jinja2's sandbox, for it comes with the model.

Templates find here what transformers gives them: `messages`, `tools`, the special tokens by name,
`raise_exception`, `strftime_now`, `tojson` without HTML's escapes, `{% generation %}`, `break` and
`continue`; lines with a block alone leave no white space. The day is always the same one, for the
same conversations must make the same tokens tomorrow.

Imported only where conversations are read: jinja2 comes with the extra `text`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ptq_cli.errors import InputError

TODAY = date(2024, 7, 26)  # which Llama 3's templates take, too, where they are not told the day
MAX_TEXT = 10 << 20  # characters of a conversation


def compile_template(text: str) -> Template:
    """Raises InputError for a template that Jinja does not take, with the line."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise InputError(f"line {error.lineno}: {error.message}") from None
    except Exception as error:  # what constants come to is computed here already
        raise InputError(_words(error)) from None


def render(
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    special_tokens: Mapping[str, str],
) -> str:
    """A conversation as text, without the beginning of an answer.

    special_tokens: `bos_token` and the like → text

    Raises:
        InputError: what the template raises, in its own words, or a text that does not end.
    """
    pieces, size = [], 0
    names = {"messages": messages, "tools": tools, "documents": None}
    try:
        for piece in template.generate(special_tokens, **names, add_generation_prompt=False):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_TEXT:
                raise InputError(f"makes more than {MAX_TEXT} characters")
    except InputError:
        raise
    except Exception as error:  # a template may do anything wrong that an expression can
        raise InputError(_words(error)) from None
    return "".join(pieces)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}`, which marks what the assistant says for training: its body is written."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
