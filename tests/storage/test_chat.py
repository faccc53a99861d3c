"""--chat: templates, BOS, packing, lines that are no conversations; through the command line where
a user meets it. The tokenizer is a stand-in; tests/interop/test_chat_templates.py has the real one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ptq_cli.errors import InputError
from ptq_cli.storage import chat
from ptq_cli.storage.chat import pack_rows
from ptq_cli.storage.chat_template import compile_template, render
from ptq_cli.storage.checkpoint import open_checkpoint
from ptq_cli.storage.tokens import Tokens, TokenSettings, read_tokens
from tests.builders import ptq
from tests.refusals import refused
from tests.run.tiny_llama import tiny_llama
from tests.storage import stand_in_tokenizers

TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('no place for ' ~ message.role) }}
    {%- endif %}
    {{- '<u>' if message.role == 'user' else '<a>' }}{{ message.content }}
{%- endfor %}
"""
ASKED = [
    ("how many", "forty two"),
    ("and then", "none"),
    ("a longer question, which goes on", "y"),
    ("why", "x"),
    ("who", "ptq"),
]


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def model(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose tokenizer adds no BOS, with a template that writes it, and chat.jsonl."""
    monkeypatch.setitem(sys.modules, "tokenizers", stand_in_tokenizers)
    folder = tiny_llama(tmp_path / "model")
    (folder / "tokenizer.json").write_text(stand_in_tokenizers.document())
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    lines = [json.dumps({"messages": messages(*asked)}) for asked in ASKED]
    lines[1:2] = [json.dumps(messages(*ASKED[1])), ""]  # a bare list, and an empty line
    Path("chat.jsonl").write_text("\n".join(lines) + "\n")
    return Path("model")


def read(model: Path, seq_len: int = 32, **settings: Any) -> Tokens:
    given = TokenSettings(chat=Path("chat.jsonl"), seq_len=seq_len, **settings)
    return read_tokens(given, open_checkpoint(model))


def ids_of(text: str) -> list[int]:
    return stand_in_tokenizers.Tokenizer('{"start": []}').encode(text, False).ids


def sequences(tokens: Tokens) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(*tokens.sequences(), strict=True)]


def test_conversations_are_packed_as_wholes(model: Path) -> None:
    tokens = read(model)
    wanted = [ids_of(f"<s><u>{question}<a>{answer}") for question, answer in ASKED]
    assert [len(ids) for ids in wanted] == [20, 15, 36, 7, 9]  # the third does not fit a row
    found = sequences(tokens)
    assert found == [*wanted[:2], wanted[2][:32], wanted[2][32:], *wanted[3:]]
    assert tokens.mask.sum(axis=1).tolist() == [20, 15, 32, 4 + 7 + 9]
    assert tokens.ids[3, :20].tolist() == wanted[2][32:] + wanted[3] + wanted[4]
    assert not tokens.ids[~tokens.mask].any()


@pytest.mark.parametrize("length", [4, 9, 64])
def test_rows_give_back_the_sequences(length: int) -> None:
    random = np.random.default_rng(length)
    lengths = random.integers(1, length + 1, 50)
    given = [random.integers(0, 9, count).tolist() for count in lengths]
    ids, mask, begins = pack_rows(given, length)
    assert ids.shape[1] == length
    assert mask.sum() == lengths.sum()
    assert sequences(Tokens("", ids, mask, begins=begins)) == given
    full = mask.sum(axis=1)
    firsts = [len(ids) for ids, start in zip(given, np.argwhere(begins), strict=True)
              if start[1] == 0]  # fmt: skip
    assert all(used + new > length for used, new in zip(full, firsts[1:], strict=False))


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("writes", [True, False])
def test_bos_stands_once_where_template_or_tokenizer_says_it(
    model: Path, adds: bool, writes: bool
) -> None:
    (model / "tokenizer.json").write_text(stand_in_tokenizers.document(*["<s>"] * adds))
    template = TEMPLATE if writes else TEMPLATE.replace("{{ bos_token }}", "")
    (model / "chat_template.jinja").write_text(template)
    for ids in sequences(read(model, 64)):
        assert ids.count(0) == (adds or writes)
        assert ids[0] == (0 if adds or writes else 2)
    pieces = sequences(read(model, 10))
    assert {ids[0] == 0 for ids in pieces} == ({True} if adds else {writes, False})
    assert {ids.count(0) for ids in pieces} == ({1} if adds else {int(writes), 0})


def test_sequences_of_text_begin_with_the_tokenizers_bos(model: Path) -> None:
    Path("a.txt").write_text("<s>" + "abcdefg" * 3 + "hij")
    settings = TokenSettings(text=Path("a.txt"), seq_len=8)
    plain = read_tokens(settings, open_checkpoint(model)).ids
    assert plain.ravel().tolist() == ids_of("<s>" + "abcdefg" * 3 + "hi")
    (model / "tokenizer.json").write_text(stand_in_tokenizers.document("<s>"))
    ids = read_tokens(settings, open_checkpoint(model)).ids
    assert ids.tolist() == [ids_of("<s>abcdefg")] * 3
    words = ("--seq-len 2 leaves no room behind 2 tokens",)
    (model / "tokenizer.json").write_text(stand_in_tokenizers.document("<s>", "<u>"))
    refused("gptq", model, "--text", "a.txt", "--seq-len", 2, "-o", "out", words=words)


def test_packed_conversations_do_not_see_one_another(model: Path) -> None:
    """Statistics are those of each conversation run alone, with its padding masked."""
    ids, mask = read(model, 64).sequences()
    np.save("ids.npy", ids)
    np.save("mask.npy", mask)
    given = {
        "packed": ("--chat", "chat.jsonl", "--seq-len", 64),
        "alone": ("--tokens", "ids.npy", "--mask", "mask.npy"),
        "row": ("--tokens", "rows.npy", "--mask", "rows_mask.npy"),
    }
    tokens = read(model, 64)
    np.save("rows.npy", tokens.ids)
    np.save("rows_mask.npy", tokens.mask)
    found = {}
    for name, words in given.items():
        made = ptq("calibrate", model, *words, "--heldout-every", 0, "-o", f"{name}.safetensors")
        assert made.code == 0, made.err
        found[name] = load_file(f"{name}.safetensors")
    deepest = next(name for name in found["packed"] if "1.mlp.down_proj" in name)
    for name, values in found["alone"].items():
        assert np.array_equal(found["packed"][name], values), name
    assert not np.allclose(found["row"][deepest], found["alone"][deepest], rtol=1e-3)


def test_from_conversations_to_a_gate(model: Path) -> None:
    chat = ("--chat", "chat.jsonl", "--seq-len", 40)
    made = ptq("gptq", model, "-b", 4, "-g", 16, *chat, "-o", "out", "--json")
    assert made.code == 0, made.err
    assert made.document["totals"]["calibrated"]
    assert ptq("gptq", model, "-b", 4, "-g", 16, *chat, "-o", "out").code == 0  # says so
    seen = ptq("eval", model, "out", *chat, "--max-kl", 9, "--allow-weak-calibration", "--json")
    assert seen.code == 0, seen.err
    quality = seen.document["quality"]
    assert quality["sequences"] == len(ASKED)
    assert quality["tokens"] == sum(len(question + answer) + 2 for question, answer in ASKED)
    nothing = ptq("gptq", model, "-b", 4, "-g", 16, *chat[:2], "--seq-len", 32, "-o", "out")
    assert nothing.code == 1
    assert "exists already" in nothing.err


def test_conversations_are_drawn_for_as_many_rows(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, encoded = np.random.default_rng(1), []
    said = ["a" * count for count in random.integers(1, 20, 200)]
    lines = [json.dumps(messages(f"{number}", words)) for number, words in enumerate(said)]
    Path("chat.jsonl").write_text("\n".join(lines))
    everything = sequences(read(model))
    assert len(everything) == len(said)
    plain = stand_in_tokenizers.Tokenizer.encode
    monkeypatch.setattr(
        stand_in_tokenizers.Tokenizer, "encode",
        lambda self, text, add_special_tokens: encoded.append(text) or plain(self, text, False),
    )  # fmt: skip
    first, same, other = (read(model, nsamples=5, seed=seed) for seed in (1, 1, 2))
    assert first.ids.shape == (5, 32)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    places = [everything.index(ids) for ids in sequences(first)]
    assert places == sorted(places)
    assert max(places) > 100
    assert len(encoded) < 100
    given = TokenSettings(chat=Path("chat.jsonl"), seq_len=32)
    assert len(read_tokens(given, open_checkpoint(model), 7).ids) == 7
    assert sequences(read_tokens(given, open_checkpoint(model), 999)) == everything


def test_fewer_rows_than_asked_for(model: Path) -> None:
    refused("rtn", model, "--chat", "chat.jsonl", "--seq-len", 32, "--nsamples", 9, "-o", "out",
            words=("chat.jsonl: 4 rows, fewer than --nsamples 9",))  # fmt: skip


def test_repeated_conversations_are_warned_of(model: Path) -> None:
    lines = Path("chat.jsonl").read_text()
    Path("chat.jsonl").write_text(lines + lines.splitlines()[0])
    [warning] = read(model, 64).warnings
    assert warning == "chat.jsonl: 1 of 6 sequences repeat an earlier one"


def test_other_packing_is_another_fingerprint(model: Path) -> None:
    ids, mask = np.arange(8).reshape(2, 4), np.ones((2, 4), bool)
    begins = [np.zeros((2, 4), bool) for _ in range(2)]
    begins[0][:, 0] = begins[1][:, 0] = begins[1][0, 2] = True
    packed = [Tokens("", ids, mask, begins=own) for own in begins]
    assert packed[0].fingerprint != packed[1].fingerprint


MESSAGE = '{"role": "user", "content": "a"}'
LINES = {
    "{": "not valid JSON",
    '{"messages": NaN}': "NaN is not JSON",
    '{"messages": [], "messages": []}': "key 'messages' stands twice",
    "3": "no messages",
    '{"conversations": []}': "no messages",
    '{"messages": []}': "messages are no list, or an empty one",
    '{"messages": "hello"}': "messages are no list",
    '["hello"]': "message 1 is not an object",
    f'[{MESSAGE}, {{"content": "a"}}]': "message 2 has no role",
    f'[{MESSAGE}, {{"role": "user", "content": 3}}]': "message 2: content is int, not text",
    f'{{"messages": [{MESSAGE}], "tools": {{}}}}': "tools are dict, not a list",
    '[{"role": "system", "content": "a"}]': "model/chat_template.jinja: no place for system",
}


@pytest.mark.parametrize("line", LINES)
def test_lines_that_are_no_conversations(model: Path, line: str) -> None:
    Path("chat.jsonl").write_text(f"[{MESSAGE}]\n\n{line}\n")
    words = ("chat.jsonl: line 3: ", LINES[line])
    refused("gptq", model, "--chat", "chat.jsonl", "-o", "out", words=words)


FAILING = {
    "{{ messages[0].content.nothing.at_all }}": "has no attribute 'nothing'",
    "{{ 1 / 0 }}": "division by zero",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(messages) }}": "append",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "recursion",
    "{% for a in range(9999) %}{{ 'a' * 9999 }}{% endfor %}": "makes more than 10485760 characters",
    "{% for %}": "line 1: Expected",
    "\n{{ x | nothing }}": "line 2: No filter named 'nothing'",
    "{% include 'other.jinja' %}": "no loader",
}


@pytest.mark.parametrize("template", FAILING)
def test_templates_that_fail(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template)
    words = ("chat_template.jinja: ", FAILING[template])
    refused("gptq", model, "--chat", "chat.jsonl", "-o", "out", words=words)


@pytest.mark.parametrize("start", [(), ("<s>",)])
def test_conversations_without_a_text(model: Path, start: tuple[str, ...]) -> None:
    (model / "tokenizer.json").write_text(stand_in_tokenizers.document(*start))
    (model / "chat_template.jinja").write_text("".join(start))
    words = ("chat.jsonl: line ", "the chat template makes no text of it")
    refused("gptq", model, "--chat", "chat.jsonl", "-o", "out", words=words)


def test_what_is_missing_or_does_not_go_together(model: Path) -> None:
    given = ("gptq", model, "-o", "out", "--chat")
    np.save("mask.npy", np.ones((4, 32), int))
    refused(*given, "none.jsonl", words=("none.jsonl: No such file",))
    refused(*given, "chat.jsonl", "--text", "a.txt", words=("--text and --chat exclude each",))
    refused(*given, "chat.jsonl", "--mask", "mask.npy", words=("--mask goes with --tokens",))
    Path("empty.jsonl").write_text("\n\n")
    refused(*given, "empty.jsonl", words=("empty.jsonl: no conversations", '"messages"'))
    (model / "chat_template.jinja").write_bytes(b"\xff")
    refused(*given, "chat.jsonl", words=("model/chat_template.jinja: not UTF-8",))
    (model / "chat_template.jinja").unlink()
    refused(*given, "chat.jsonl", words=("model: no chat template", "--text FILE"))
    for stated, words in ((3, "chat_template 'default' is int"), ([{}], "nor several by name")):
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
        refused(*given, "chat.jsonl", words=("model/tokenizer_config.json", words))
    (model / "tokenizer.json").unlink()
    refused(*given, "chat.jsonl", words=("model: no tokenizer.json",))


def test_where_templates_are_found(model: Path) -> None:
    checkpoint, settings = open_checkpoint(model), model / "tokenizer_config.json"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    settings.write_text(json.dumps({"chat_template": named}))
    file = "model/chat_template.jinja"
    assert chat.chat_templates(checkpoint) == {"default": (file, TEMPLATE)}
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("u")
    other = "model/additional_chat_templates/tool_use.jinja"
    found = chat.chat_templates(checkpoint)
    assert found == {"default": (file, TEMPLATE), "tool_use": (other, "u")}
    (model / "additional_chat_templates" / "tool_use.jinja").unlink()
    (model / "chat_template.jinja").unlink()
    assert chat.chat_templates(checkpoint) == {
        "default": (str(settings), "d"), "tool_use": (str(settings), "t")
    }  # fmt: skip
    settings.write_text(json.dumps({"chat_template": "d"}))
    assert chat.chat_templates(checkpoint) == {"default": (str(settings), "d")}


def test_tools_take_the_template_for_tools(model: Path) -> None:
    (model / "additional_chat_templates").mkdir()
    other = model / "additional_chat_templates" / "tool_use.jinja"
    other.write_text("{{ tools | tojson }}")
    tools = [{"name": "f", "note": "<é>"}]
    lines = [{"messages": messages("a", "b"), "tools": own} for own in (tools, [], None)]
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with_tools, *without = sequences(read(model, 64))
    assert with_tools == ids_of('[{"name": "f", "note": "<é>"}]')
    assert without == [ids_of("<s><u>a<a>b")] * 2


def test_what_templates_find() -> None:
    def text(template: str, *said: dict[str, Any], **special: str) -> str:
        return render(compile_template(template), said, None, special)

    assert text("{{ messages[0].content }}{{ eos_token }}", {"content": "<b>"}, eos_token="e") == (
        "<b>e"
    )
    assert text("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    assert text("  {% if true %}\na\n  {% endif %}\nb") == "a\nb"
    assert text("{% for x in range(9) %}{% if x > 2 %}{% break %}{% endif %}{{ x }}{% endfor %}"
                ) == "012"  # fmt: skip
    assert text("{% generation %}a{% set x = 1 %}{% endgeneration %}{{ x }}b") == "ab"
    assert text("{{ {'b': 1, 'a': 'é<'} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": "é<"\n}'
    assert text("{{ tools is none }}{{ add_generation_prompt }}") == "TrueFalse"
    with pytest.raises(InputError, match="unsupported"):
        text("{{ 1 + 'a' }}")
