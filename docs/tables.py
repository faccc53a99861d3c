"""The generated parts of docs/: each function gives Markdown made from the code.

A page says where its part stands, between markers that cog knows:

    <!-- [[[cog import tables; cog.out(tables.settings()) ]]] -->
    <!-- [[[end]]] -->

`cog -r -I docs docs/*.md` writes them anew; `cog --check` in CI and tests/docs/test_docs_made.py
find what has gone stale.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, get_origin

import click

from ptq_cli.cli.main import COMMANDS, cli
from ptq_cli.core.settings import default_of, settings_fields
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.models.block_sites import kinds
from ptq_cli.models.families import FAMILIES, family_of
from ptq_cli.models.family import Family
from ptq_cli.plan.grid_settings import GridSettings, default_settings
from ptq_cli.plan.mixes import MIXES, ModelFacts, mix_types, role_of
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.registry import METHODS, SMOOTHERS, method, smoother

TESTS = Path(__file__).parents[1] / "tests"
WIDTH = 80
PACKS = default_settings("pack")


def commands() -> str:
    """What `--help` says, of `ptq` and of every command."""
    top = click.Context(cli, info_name="ptq", terminal_width=WIDTH, **cli.context_settings)
    parts = [f"## ptq\n\n```text\n{cli.get_help(top)}\n```\n"]
    for name in COMMANDS:
        command = cli.get_command(top, name)
        assert command is not None
        own = click.Context(command, parent=top, info_name=name)
        parts.append(f"## ptq {name}\n\n```text\n{command.get_help(own)}\n```\n")
    return "\n" + "\n".join(parts) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |\n"


def escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n" + _row(head) + _row("---" for _ in head) + "".join(map(_row, rows))


# -- settings ------------------------------------------------------------------------------------


def settings() -> str:
    """Every field of every settings class: option, recipe key, default, values, meaning."""
    parts = ["\n## Of every quantizing command", _fields(GridSettings)]
    parts += [
        f"## Of `ptq {name}`\n\n{smoother(name).help}\n{_defaults(name)}"
        f"{_fields(smoother(name).settings)}"
        for name in SMOOTHERS
    ]
    parts += [
        f"## Of `ptq {name}`\n\n{method(name).help}\n{_fields(method(name).settings)}"
        for name in METHODS
        if name not in SMOOTHERS
    ]
    packs = ", ".join(f"`{key} = {_toml(value)}`" for key, value in PACKS.items())
    parts.append(f"`ptq pack` has the settings of `ptq rtn` but `weight`, and {packs}.\n\n")
    return "\n".join(parts)


def schemes() -> str:
    """What each scheme stands for."""
    return table(
        ["scheme", "stands for", "settings", "format unless another is named"],
        [
            [
                f"`{name}`",
                scheme.help,
                "fixed" if scheme.fixed else "may be said otherwise",
                f"`{scheme.settings.get('format', 'ptq')}`",
            ]
            for name, scheme in SCHEMES.items()
        ],
    )


def mixes() -> str:
    """What each mix makes of a Llama 3 of 8 billion parameters: types by role, bits per weight."""
    facts = ModelFacts("llama", 32, 32, 8)
    widths = {"attn_q": 4096, "attn_k": 1024, "attn_v": 1024, "attn_output": 4096}
    shapes = {f"blk.{i}.{name}.weight": (n, 4096) for i in range(32) for name, n in widths.items()}
    for i in range(32):
        shapes |= {f"blk.{i}.ffn_{name}.weight": (14336, 4096) for name in ("gate", "up")}
        shapes[f"blk.{i}.ffn_down.weight"] = (4096, 14336)
    shapes |= {f"{name}.weight": (128256, 4096) for name in ("token_embd", "output")}
    return table(
        ["scheme", "most tensors", "`attn_v`", "`ffn_down`", "`attn_output`", "`output`", "bits"],
        [_mix(name, shapes, facts) for name in MIXES],
    )


def _mix(name: str, shapes: dict[str, tuple[int, ...]], facts: ModelFacts) -> list[str]:
    types = mix_types(name, facts, shapes)
    cells = []
    for role in ("attn_v", "ffn_down", "attn_output", "output"):
        found = Counter(types[tensor] for tensor in shapes if role_of(tensor) == role)
        many = len(found) > 1
        cells.append(", ".join(f"{n} {kind}" if many else kind for kind, n in found.items()))
    bits = sum(prod(shape) * TYPES[types[name]].bits_per_weight for name, shape in shapes.items())
    mean = f"{bits / sum(map(prod, shapes.values())):.2f}"
    return [f"`{name}`", types["blk.0.ffn_up.weight"], *cells, mean]


def _defaults(name: str) -> str:
    own = smoother(name).defaults
    said = ", ".join(f"`{key} = {_toml(value)}`" for key, value in own.items())
    return f"Other defaults than above: {said}.\n" if own else ""


def _fields(cls: type[Any]) -> str:
    return table(
        ["recipe key", "option", "default", "values", "meaning"],
        [_field(field, kind) for field, kind in settings_fields(cls)],
    )


def _field(field: Any, kind: Any) -> list[str]:
    meta, word = field.metadata, field.name.replace("_", "-")
    option = f"`--{word}`"
    if kind is bool:
        option += f", `--{meta.get('off', 'no-' + word)}`"
    if "short" in meta:
        option += f", `{meta['short']}`"
    own = default_of(field)
    default = meta.get("shown") or f"`{_toml(own)}`"
    return [
        f"`{field.name}`",
        "" if meta.get("recipe_only") else option,
        default if own not in ((), "", {}) else "",
        _values(meta, kind),
        meta["help"],
    ]


def _values(meta: Any, kind: Any) -> str:
    choices = meta.get("choices")
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    low, high = meta.get("min"), meta.get("max")
    if low is None and high is None:
        tables = kind == tuple[str, ...] and "a list of patterns"
        if get_origin(kind) is Mapping:
            return "`[table]`"
        return tables or ("" if kind is bool else "`[[tables]]`" if kind is not str else "a name")
    said = f"{low:g} or more" if high is None else f"{low:g} … {high:g}"
    return said + "".join(f", `{word}`" for word in meta.get("words", ()))


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- families of models --------------------------------------------------------------------------


def families() -> str:
    """What is known of each family."""
    head = ["family", "`model_type`", "sites of a block", "folds", "forward", "GGUF"]
    rows = (_family(family) for family in sorted(FAMILIES, key=lambda family: family.name))
    return table(head, rows) + "\n"


def _counted(counts: Iterable[int]) -> str:
    """Of each kind of block."""
    return " or ".join(map(str, sorted(set(counts))))


def _family(family: Family) -> list[str]:
    blocks = kinds(family)
    return [
        family.name,
        ", ".join(f"`{kind}`" for kind in family.model_types),
        _counted(len(kind) for kind in blocks),
        _counted(sum(site.reason is None for site in kind) for kind in blocks),
        "yes" if family.forward else "no",
        f"`{family.gguf.architecture}`" if family.gguf else "no",
    ]


def models() -> str:
    """What the tests in tests/interop found of each architecture."""
    from tests.interop.forward_models import ROWS

    loaded = json.loads((TESTS / "interop" / "loaded.json").read_text("utf-8"))
    names = {*loaded, *(name.split()[0] for name in ROWS)}
    head = ["model", "family", "forward", "folds", "GGUF", "loaded by"]
    return table(head, [_model(name, loaded.get(name, {})) for name in sorted(names)]) + "\n"


def _model(name: str, own: dict[str, str]) -> list[str]:
    from tests.interop import test_gguf_families
    from tests.interop.forward_models import ROWS, WITHOUT_A_FORWARD
    from tests.interop.test_folding_architectures import ALL, LEFT

    kind = own.get("model_type", name)
    family = family_of({"model_type": kind})
    known = own.get("family") or (family.name if family else "")
    equal = kind in {row.split()[0] for row in ROWS} - WITHOUT_A_FORWARD
    sites, left = LEFT.get(name, (8, 0))
    ran = {row.split()[0] for row in test_gguf_families.MODELS} & {kind, kind.removesuffix("_text")}
    return [
        f"`{name}`",
        known,
        "equal" if equal else "",
        f"{sites - left} of {sites}" if name in ALL else "",
        "llama.cpp" if ran else "",
        own.get("loaded", ""),
    ]
