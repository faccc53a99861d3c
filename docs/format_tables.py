"""The generated parts of docs/ that are about formats and runtimes, as docs/tables.py has the
others: found by asking them about layers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

from tables import escaped, table

from ptq_cli.core.grid import Activation, Grid
from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.formats import ptq
from ptq_cli.formats.runtimes import RUNTIMES, facts, loads
from ptq_cli.formats.runtimes.artifact import FAILS, LIMIT, NOTE, Artifact, Fact
from ptq_cli.plan.schemes import SCHEMES
from ptq_cli.registry import FORMATS, format_named

BITS = range(2, 9)
GROUPS = (16, 32, 64, 96, 128, 256, -1, 0)
SYMMETRIES = (True, False)
FLOATS = [
    name
    for name, own in SCHEMES.items()
    if own.fixed or (own.inputs is not None and own.inputs.levels != "integer")
]


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
    return table(["format", *RUNTIMES], rows) + "\n"


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
        f" {escaped(str(fact))}\n"
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
    return table(head, [[f"`{name}`", *_holds(format_named(name))] for name in FORMATS]) + "\n"


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
