"""Conversations (JSON lines) as sequences of token ids, by the model's own chat template.

A line is an object with `messages`, and with `tools` where they are offered, or the list of
messages itself; a message has a `role`, and `content` or what else its template reads.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.errors import InputError, import_extra, stated_in
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing, named, parse_json, read_small, regular_file
from ptq_cli.storage.tokenizer import Tokenizer, open_tokenizer

SETTINGS = "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates"
SHAPE = 'a line is {"messages": [{"role": "user", "content": "..."}, ...]}'


@dataclass(frozen=True)
class Conversation:
    """line: where it stands, from 1; tools: JSON schemas of functions, or None"""

    line: int
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def chat_sequences(
    path: Path, checkpoint: Checkpoint, length: int, wanted: int | None, seed: int
) -> list[list[int]]:
    """Conversations of a file in its order, each as one sequence of ids, or, where it is longer
    than `length`, as several, one behind the other.

    wanted: tokens; as many conversations are drawn with `seed` as have these; None: all

    Raises:
        InputError: a line that is no conversation, no template, one that fails, no tokenizer.
    """
    import_extra("jinja2", "--chat", "text")
    as_ids = _Encoder.of(checkpoint)
    conversations = list(_conversations(path))
    if not conversations:
        raise InputError(f"{path}: no conversations", hint=SHAPE)
    order = np.arange(len(conversations))
    if wanted is not None:
        np.random.default_rng(seed).shuffle(order)
    found: dict[int, list[list[int]]] = {}
    n_tokens = 0
    for number in order.tolist():
        conversation = conversations[number]
        where = f"{path}: line {conversation.line}"
        with stated_in(where):
            ids = as_ids(conversation)
        found[number] = as_ids.tokenizer.sequences(ids, length)
        if not found[number]:
            raise InputError(f"{where}: the chat template makes no text of it")
        n_tokens += len(ids)
        if wanted is not None and n_tokens >= wanted:
            break
    return [ids for number in sorted(found) for ids in found[number]]


@dataclass(frozen=True)
class _Encoder:
    """A conversation to the ids of its text.

    templates: name → where a template stands, and it, compiled; special_tokens: name → text
    """

    tokenizer: Tokenizer
    templates: Mapping[str, tuple[str, Any]]
    special_tokens: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _Encoder:
        from ptq_cli.storage.chat_template import compile_template

        tokenizer, found = open_tokenizer(checkpoint, "--chat"), chat_templates(checkpoint)
        if "default" not in found:
            raise InputError(f"{checkpoint.path}: no chat template", hint="--text FILE")
        templates = {}
        for name in {"default", "tool_use"} & found.keys():
            where, text = found[name]
            with stated_in(where):
                templates[name] = (where, compile_template(text))
        return cls(tokenizer, templates, _special_tokens(checkpoint))

    def __call__(self, conversation: Conversation) -> list[int]:
        from ptq_cli.storage.chat_template import render

        with_tools = conversation.tools is not None and "tool_use" in self.templates
        where, template = self.templates["tool_use" if with_tools else "default"]
        with stated_in(where):
            text = render(template, conversation.messages, conversation.tools, self.special_tokens)
        return self.tokenizer.encode(text)


def pack_rows(
    sequences: list[list[int]], length: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Sequences in their order, as many to a row of `length` as find room in it as a whole.

    Returns ids int64 [n, length], mask bool [n, length], false at padding, and where sequences
    begin, bool [n, length].
    """
    places, row, column = [], 0, 0
    for ids in sequences:
        if column + len(ids) > length:
            row, column = row + 1, 0
        places.append((row, slice(column, column + len(ids))))
        column += len(ids)
    shape = (row + 1, length)
    rows, mask, begins = np.zeros(shape, np.int64), np.zeros(shape, np.bool_), np.zeros(shape, bool)
    for (row, columns), ids in zip(places, sequences, strict=True):
        rows[row, columns] = ids
        mask[row, columns] = True
        begins[row, columns.start] = True
    return rows, mask, begins


def chat_templates(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """name → where a chat template stands, and its text; most models have a "default" alone.

    Files of templates go before those of tokenizer_config.json, as in transformers.

    Raises InputError for a file that is no text, or templates that are no names with texts.
    """
    folder, found = checkpoint.folder, {}
    names = () if checkpoint.documents else listing(folder)
    if "chat_template.jinja" in names:
        found["default"] = folder / "chat_template.jinja"
    if MORE_TEMPLATES in names and (folder / MORE_TEMPLATES).is_dir():
        files = (folder / MORE_TEMPLATES / name for name in listing(folder / MORE_TEMPLATES))
        found |= {file.stem: file for file in files if file.suffix == ".jinja"}
    if found:
        return {name: (str(file), _utf_8(file)) for name, file in found.items()}
    stated, where = _settings(checkpoint, SETTINGS).get("chat_template"), f"{folder / SETTINGS}"
    if not isinstance(stated, list):
        stated = [] if stated is None else [{"name": "default", "template": stated}]
    try:
        texts = {str(own["name"]): own["template"] for own in stated}
    except (KeyError, TypeError):
        raise InputError(f"{where}: chat_template: not a template, nor several by name") from None
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(
                f"{where}: chat_template {name!r} is {type(text).__name__}, not a template"
            )
    return {name: (where, text) for name, text in texts.items()}


def _special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """`bos_token` and the like, as templates write them."""
    older = _settings(checkpoint, "special_tokens_map.json")
    found = {}
    for name, token in {**older, **_settings(checkpoint, SETTINGS)}.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _settings(checkpoint: Checkpoint, name: str) -> Mapping[str, Any]:
    document = checkpoint.document(name)
    if not isinstance(document, dict | None):
        raise InputError(f"{checkpoint.folder / name}: not a JSON object")
    return document or {}


def _utf_8(path: Path) -> str:
    try:
        return read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None


def _conversations(path: Path) -> Iterator[Conversation]:
    """Those of a file, empty lines left out."""
    regular_file(path)
    with named(path):
        lines = path.read_bytes().removeprefix(BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            document = parse_json(line, where)
        except InputError as error:
            raise InputError(error.message, hint=SHAPE) from None
        if isinstance(document, list):
            document = {"messages": document}
        if not isinstance(document, dict) or "messages" not in document:
            raise InputError(f"{where}: no messages", hint=SHAPE)
        tools = document.get("tools")
        if not isinstance(tools, list | None):
            raise InputError(f"{where}: tools are {type(tools).__name__}, not a list")
        yield Conversation(number, _messages(where, document["messages"]), tools or None)


def _messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """Messages as templates read them."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages are no list, or an empty one", hint=SHAPE)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InputError(f"{where}: message {number} is not an object", hint=SHAPE)
        if not isinstance(message.get("role"), str):
            raise InputError(f"{where}: message {number} has no role", hint=SHAPE)
        if not isinstance(content := message.get("content"), str | list | None):
            raise InputError(
                f"{where}: message {number}: content is {type(content).__name__}, not text",
                hint=SHAPE,
            )
    return [_as_read(message) for message in messages]


def _as_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without keys that are null, which templates take for text; what was thought before an answer
    stands under both names that templates know it by, as in transformers."""
    said = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in said:
            return {"thinking": said[name], **said, "reasoning_content": said[name]}
    return said
