"""--chat against transformers' `apply_chat_template`: the same ids, conversation by conversation;
from a GGUF file, too. The templates do what those of well-known models do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.tokens import TokenSettings, read_tokens
from tests.builders import half_sample, ptq

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TURNS = """\
{%- for message in messages -%}
    {{ '<|' ~ message.role ~ '|>\n' ~ (message.content or '') | trim }}{{ eos_token }}
{% endfor %}
"""
TEMPLATES = {
    "plain": "{{ bos_token }}" + TURNS,
    "without BOS": TURNS,
    "blocks on lines of their own": """\
    {% set ns = namespace(system='', n=0) %}
    {# a comment #}
    {% for message in messages if message['role'] != 'tool' %}
        {% set ns.n = ns.n + 1 %}
        {% if message['role'] == 'system' %}
            {% set ns.system = message['content'] %}
            {% continue %}
        {% endif %}
        {% generation %}{{ ns.n }}: {{ message.content | default('-', true) }}
        {% endgeneration %}
        {% if loop.last %}{{ ns.system | upper }}{% break %}{% endif %}
    {% endfor %}
""",
    "tools": """\
{{- bos_token }}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=2) }}
    {%- endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}
    {%- else %}[{{ message.role }}] {{ message['content'] }}{% endif %}
    {{- message.reasoning_content }}{{ message.thinking }}{{ message.reasoning is defined }}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}
""",
}  # fmt: skip
FUNCTION = {"name": "add", "description": "a < b & 'é'", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": [30, None]}}}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " def f(x):\n    return '</s>' + 試 🙂  "},
        {"role": "assistant", "content": "<s>yes", "reasoning": "Hm."},
    ]},
    {"messages": [{"role": "user", "content": "x = 1\n" * 9, "name": None}]},
    {"messages": [{"role": "assistant", "thinking": "So", "reasoning_content": "", "content": ""}]},
    {"messages": [
        {"role": "user", "content": "12 + 30?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42"},
    ], "tools": [{"type": "function", "function": FUNCTION}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of two blocks, and conversations beside it."""
    folder = half_sample(tmp_path_factory.mktemp("chat") / "model")
    lines = "\n".join(json.dumps(conversation) for conversation in CONVERSATIONS)
    (folder.parent / "chat.jsonl").write_text(lines)
    return folder


def sequences(model: Path, length: int = 512) -> list[list[int]]:
    settings = TokenSettings(chat=model.parent / "chat.jsonl", seq_len=length)
    ids, mask = read_tokens(settings, open_checkpoint(model)).sequences()
    return [row[shown].tolist() for row, shown in zip(ids, mask, strict=True)]


def theirs(model: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(own["messages"], own.get("tools"), return_dict=False)
        for own in CONVERSATIONS
    ]


def begin_with_bos(model: Path) -> None:
    """Let tokenizer.json put BOS before a text, and cut and pad texts to four tokens."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    one = tokenizer["post_processor"]
    one["single"].insert(0, {"SpecialToken": {"id": "<s>", "type_id": 0}})
    one["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    tokenizer["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    tokenizer["padding"] = {
        "strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
        "pad_type_id": 0, "pad_token": "</s>",
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(model: Path, name: str) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATES[name])
    assert sequences(model) == theirs(model)


def test_templates_by_name_in_the_settings(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    path = model / "tokenizer_config.json"
    before = path.read_text()
    named = [{"name": "default", "template": TEMPLATES["plain"]},
             {"name": "tool_use", "template": TEMPLATES["tools"]}]  # fmt: skip
    path.write_text(json.dumps(json.loads(before) | {"chat_template": named}))
    assert sequences(model) == theirs(model)
    (model / "chat_template.jinja").write_text(TEMPLATES["without BOS"])
    assert sequences(model) == theirs(model)
    words = ("-g", 32, "--format", "gguf", "-q", "-o", model.parent / "model.gguf")
    assert ptq("rtn", model, *words).code == 0
    metadata = read_gguf_header(model.parent / "model.gguf").metadata
    assert metadata["tokenizer.chat_template"] == TEMPLATES["without BOS"]
    assert sequences(model) == theirs(model)
    path.write_text(before)


def test_a_tokenizer_that_begins_texts_with_bos(model: Path) -> None:
    """As transformers begins a text; in a conversation, too, and never twice."""
    begin_with_bos(model)
    (model / "chat_template.jinja").write_text(TEMPLATES["plain"])
    written = theirs(model)
    assert sequences(model) == written
    (model / "chat_template.jinja").write_text(TEMPLATES["without BOS"])
    assert [ids[1:] for ids in written] == theirs(model)
    assert sequences(model) == written
    text = model.parent / "a.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    [ids] = read_tokens(TokenSettings(text=text, seq_len=64), open_checkpoint(model), 1).ids
    assert ids[0] == tokenizer.bos_token_id
    first = read_tokens(TokenSettings(text=text, seq_len=64), open_checkpoint(model)).ids[0]
    assert first.tolist() == tokenizer(text.read_text(), truncation=False).input_ids[:64]


def test_a_gguf_file_has_tokenizer_and_template_in_itself(model: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATES["plain"])
    file, chat = model.parent / "own.gguf", ("--chat", model.parent / "chat.jsonl")
    assert ptq("rtn", model, "-g", 32, "--format", "gguf", "-q", "-o", file).code == 0
    given = TokenSettings(chat=chat[1], seq_len=512)
    ids, mask = read_tokens(given, open_float(file)).sequences()
    assert [row[shown].tolist() for row, shown in zip(ids, mask, strict=True)] == theirs(model)
    words = ("gptq", file, "-b", 4, "-g", 32, *chat, "--seq-len", 64, "-q", "--json")
    made = ptq(*words, "-o", model.parent / "out")
    assert made.code == 0, made.err
    assert made.document["totals"]["calibrated"]
