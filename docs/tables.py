"""The generated parts of docs/: each function gives Markdown made from the code.

A page says where its part stands, between markers that cog knows:

    <!-- [[[cog import tables; cog.out(tables.settings()) ]]] -->
    <!-- [[[end]]] -->

`cog -r -I docs docs/*.md` writes them anew; `cog --check` in CI and tests/docs/test_docs_made.py
find what has gone stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_origin

import click

from ptq_cli.cli.main import COMMANDS, cli
from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.core.settings import default_of, settings_fields
from ptq_cli.formats import ptq
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.formats.runtimes import RUNTIMES, facts, loads
from ptq_cli.formats.runtimes.artifact import FAILS, LIMIT, NOTE, Artifact, Fact
from ptq_cli.models.block_sites import kinds
from ptq_cli.models.families import FAMILIES, family_of
from ptq_cli.models.family import Family
from ptq_cli.plan.grid_settings import GridSettings, default_settings
from ptq_cli.plan.mixes import MIXES, ModelFacts, mix_types, role_of
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.registry import FORMATS, METHODS, SMOOTHERS, format_named, method, smoother

TESTS = Path(__file__).parents[1] / "tests"
WIDTH = 80
PACKS = default_settings("pack")
BITS = range(2, 9)
GROUPS = (16, 32, 64, 96, 128, 256, -1, 0)
SYMMETRIES = (True, False)
FLOATS = [
    name
    for name, own in SCHEMES.items()
    if own.fixed or (own.inputs is not None and own.inputs.levels != "integer")
]


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
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
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
    return _table(
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
    return _table(
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
    return _table(
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


# -- formats and runtimes ------------------------------------------------------------------------


def _layer(bits: int, group: int, sym: bool, **more: Any) -> Layer:
    """A linear of a llama in bfloat16, 256 by 768."""
    module, shape = more.pop("module", "model.layers.0.mlp.down_proj"), (256, 768)
    dtype, scales = more.pop("dtype", "BF16"), more.pop("scale_dtype", "float16")
    grid = Grid(bits, group, sym, scale_dtype=scales)
    return Layer(module, f"{module}.weight", shape, shape, dtype, grid, **more)


def _held(fmt: Format, bits: int, group: int, sym: bool, **more: Any) -> Layer | None:
    """The layer as the format holds it, with the scales it wants; or None."""
    wants = fmt.scale_dtype(more.get("dtype", "BF16")) if fmt.scale_dtype else "float16"
    own = _layer(bits, group, sym, scale_dtype=wants, **more)
    return own if fmt.misfit(own) is None else None


def _artifact(name: str, own: Layer, head: Layer | None = None) -> Artifact:
    """A model of such layers in this format, as it declares itself."""
    fmt = format_named(name)
    layers, dense = [own, *([head] if head else [])], [] if head else ["lm_head"]
    config: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16"}
    config |= dict.fromkeys(fmt.config_keys, fmt.config(layers, dense))
    files = ["model.gguf"] if name == "gguf" else ["config.json", "tokenizer.json"]
    return Artifact(name, layers, dense, config, files)


def _held_layers(name: str) -> Iterator[Layer]:
    for bits, group, sym, inputs in product(BITS, GROUPS, SYMMETRIES, (None, Activation())):
        own = _held(format_named(name), bits, group, sym, activation=inputs)
        if own is not None:
            yield own
    yield from _of_schemes(name).values()


def _of_schemes(name: str) -> dict[str, Layer]:
    """A layer of each scheme with small floats that the format holds."""
    fmt, found = format_named(name), {}
    for scheme in FLOATS:
        own = SCHEMES[scheme]
        plain = _layer(8, -1, True, scale_dtype=fmt.scale_dtype("BF16"))
        stated = {k: v for k, v in own.settings.items() if hasattr(plain.grid, k)}
        grid = dataclasses.replace(plain.grid, **{**stated, **own.grid})
        layer = dataclasses.replace(plain, grid=grid, activation=own.inputs)
        if fmt.misfit(layer) is None:
            found[scheme] = layer
    return found


def _integers(layers: Iterable[Layer]) -> list[Layer]:
    """Those without small floats, of weights or inputs."""
    return [
        own
        for own in layers
        if own.grid.levels == "integer"
        and (own.activation is None or own.activation.levels == "integer")
    ]


def _loaded(name: str, runtime: str) -> list[Layer]:
    """Layers that the format holds and the runtime loads."""
    return [own for own in _held_layers(name) if loads(facts(_artifact(name, own), runtime))]


def _numbers(values: Iterable[int]) -> str:
    """2, 3, 4, 8 of a set; 2–8 where none is missing."""
    own = sorted(set(values))
    whole = len(own) > 3 and own == list(range(own[0], own[-1] + 1))
    return f"{own[0]}–{own[-1]}" if whole else ", ".join(map(str, own))


def _symmetries(layers: Iterable[Layer]) -> str:
    """`4, 8 sym; 4 asym` of layers."""
    own = list(layers)
    widths = {sym: _numbers(x.grid.bits for x in own if x.grid.sym is sym) for sym in SYMMETRIES}
    if widths[True] == widths[False]:
        return f"{widths[True]} both"
    words = ((widths[True], "sym"), (widths[False], "asym"))
    return "; ".join(f"{bits} {word}" for bits, word in words if bits)


def runtimes() -> str:
    """Which runtime loads which format, with which bits, as `ptq check` knows it."""
    rows = [[f"`{name}`", *(_cell(name, runtime) for runtime in RUNTIMES)] for name in FORMATS]
    return _table(["format", *RUNTIMES], rows) + "\n"


def _cell(name: str, runtime: str) -> str:
    integers = _integers(_loaded(name, runtime))
    packed = [layer for layer in integers if layer.activation is None]
    said = [_symmetries(packed)] if packed else []
    schemes = _of_schemes(name).items()
    floats = [word for word, own in schemes if loads(facts(_artifact(name, own), runtime))]
    return "; ".join(said + _rounded(integers) + ([", ".join(floats)] if floats else []))


def _rounded(layers: Iterable[Layer]) -> list[str]:
    """`W4A8, W8A8` of layers whose inputs are rounded too."""
    widths = {layer.grid.bits for layer in layers if layer.activation is not None}
    return [", ".join(f"W{bits}A8" for bits in _numbers(widths).split(", "))] if widths else []


def remarks() -> str:
    """What is known of each runtime, worst first, by the formats that it is known of."""
    return "\n" + "\n".join(f"### {name}\n\n{_remarks(name)}" for name in RUNTIMES) + "\n"


def _remarks(runtime: str) -> str:
    known: dict[Fact, dict[str, None]] = {}
    for name in (name for name in FORMATS if _loaded(name, runtime)):
        for own in _held_layers(name):
            head = dataclasses.replace(own, module="lm_head", tensor="lm_head.weight")
            both = (own,) if format_named(name).misfit(head) else (own, head)
            for fact in facts(_artifact(name, *both), runtime):
                known.setdefault(dataclasses.replace(fact, modules=()), {})[name] = None
    order = sorted(known, key=lambda fact: (FAILS, LIMIT, NOTE).index(fact.level))
    return "".join(
        f"- **{fact.level}** ({', '.join(f'`{name}`' for name in known[fact])}):"
        f" {_escaped(str(fact))}\n"
        for fact in order
    )


def holds() -> str:
    """What each format holds, found by asking it about layers."""
    head = [
        "format",
        "bits",
        "group sizes",
        "asymmetric",
        "act-order desc",
        "rounded inputs",
        "small floats",
        "scales",
    ]
    head += ["short last group", "embeddings", "`lm_head`"]
    return _table(head, [[f"`{name}`", *_holds(format_named(name))] for name in FORMATS]) + "\n"


def _holds(fmt: Format) -> list[str]:
    grids = [
        (own.grid.bits, own.grid.group_size, own.grid.sym)
        for bits, group, sym in product(BITS, GROUPS, SYMMETRIES)
        if (own := _held(fmt, bits, group, sym))
    ]
    floats = _of_schemes(fmt.name)
    base = _held(fmt, *next(g for g in grids if g[2])) if grids else next(iter(floats.values()))
    assert base is not None
    wide = dataclasses.replace(base, grid=dataclasses.replace(base.grid, group_size=128))
    uneven = dataclasses.replace(wide, shape=(256, 800), full_shape=(256, 800))
    asym = {grid[0] for grid in grids if not grid[2]}
    bits = {grid[0] for grid in grids}
    scales = [word for word in ("float16", "bfloat16", "float32") if _stores(fmt, base, word)]

    def held(own: Layer) -> str:
        return "no" if fmt.misfit(own) else "yes"

    def named(module: str) -> str:
        return held(dataclasses.replace(base, module=module, tensor=f"{module}.weight"))

    return [
        _numbers(bits) if bits else "none",
        _sizes([size for size in GROUPS if any(grid[1] == size for grid in grids)]),
        "yes" if asym and asym == bits else _numbers(asym) + " bits" if asym else "no",
        held(dataclasses.replace(base, reordered=True)),
        (_rounded(_integers(_held_layers(fmt.name))) or ["no"])[0],
        ", ".join(floats) or "no",
        ", ".join(scales) + (" as the model" if fmt.name == "compressed-tensors" else ""),
        held(uneven),
        named("model.embed_tokens"),
        named("lm_head"),
    ]


def _stores(fmt: Format, base: Layer, word: str) -> bool:
    """Whether a format stores scales so, of a model in some dtype."""
    grid = dataclasses.replace(base.grid, scale_dtype=word)
    own = dataclasses.replace(base, grid=grid)
    return any(
        fmt.misfit(dataclasses.replace(own, dtype=dtype)) is None
        for dtype in ("F16", "BF16", "F32")
    )


def _sizes(sizes: list[int]) -> str:
    positive = [size for size in sizes if size > 0]
    named = [size for size in GROUPS if size > 0]
    said = "any" if positive == named else ", ".join(map(str, positive))
    if positive == [size for size in named if size % 32 == 0]:
        said = "multiples of 32"
    return said + "".join(f", {size}" for size in sizes if size <= 0)


def native() -> str:
    """The native layout, in the words of its module."""
    return f"\n```text\n{inspect.getdoc(ptq)}\n```\n\n"


# -- families of models --------------------------------------------------------------------------


def families() -> str:
    """What is known of each family."""
    head = ["family", "`model_type`", "sites of a block", "folds", "forward", "GGUF"]
    rows = (_family(family) for family in sorted(FAMILIES, key=lambda family: family.name))
    return _table(head, rows) + "\n"


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
    return _table(head, [_model(name, loaded.get(name, {})) for name in sorted(names)]) + "\n"


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
