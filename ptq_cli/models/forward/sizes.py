"""Whether config.json and the tensors of a checkpoint tell of the same model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ptq_cli.core.names import fold_names
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.models.experts import is_expert
from ptq_cli.models.family import Config, text_config
from ptq_cli.models.forward.architecture import Architecture, Block
from ptq_cli.models.forward.layers import Linear, Norm

Specs = Mapping[str, TensorSpec]
HINT = "is this config.json the model's own?"


def check_sizes(arch: Architecture, specs: Specs, config: Config) -> None:
    """Refuse a checkpoint whose tensors are not those that config.json describes.

    specs: the headers of the whole checkpoint

    Raises:
        InputError: a tensor that is missing, or that has another shape, and both shapes; another
            number of blocks or experts, and both numbers.
    """
    stored: dict[int, set[str]] = defaultdict(set)
    for name in specs:
        number, _, inner = name.removeprefix(arch.inside).partition(".")
        if name.startswith(arch.inside) and number.isdigit():
            stored[int(number)].add(inner)
    _check_count(len(arch.blocks), stored, text_config(config))
    sizes = f"vocab_size {arch.vocab_size}, hidden_size {arch.hidden_size}"
    width = arch.hidden_size
    if arch.projections and arch.embedding in specs:  # from a width of its own
        width = specs[arch.embedding].shape[-1]
    _check(specs, arch.embedding, (arch.vocab_size, width), sizes)
    if arch.head in specs:
        _check(specs, arch.head, (arch.vocab_size, width), sizes)
    if arch.positions is not None and arch.positions not in specs:
        raise InputError(f"no tensor {arch.positions!r}, which config.json asks for", hint=HINT)
    for part in _parts((arch.final_norm, arch.embedding_norm)):
        _check_vectors(specs, part, arch.hidden_size)
    for index, block in enumerate(arch.blocks):
        _check_block(arch, block, specs)
        _check_experts(arch, block, {f"{arch.inside}{index}.{inner}" for inner in stored[index]})


def _check_count(count: int, stored: Mapping[int, set[str]], config: Config) -> None:
    """Refuse too few blocks, and more than config.json says, unless these are of another kind: they
    predict further tokens."""
    present = [number for number in range(count) if stored.get(number)]
    if len(present) < count:
        raise InputError(
            f"config.json's num_hidden_layers is {count}, but there are {len(present)} blocks",
            hint="name the whole model, not one of its shards" if stored else HINT,
        )
    more = [number for number in stored if number >= count]
    usual = set().union(*(stored[number] for number in range(count)))
    plain = [number for number in more if stored[number] <= usual]
    stated = config.get("num_nextn_predict_layers")
    if more and isinstance(stated, int) and len(more) > stated:
        raise InputError(
            f"config.json's num_hidden_layers is {count} and its num_nextn_predict_layers {stated},"
            f" but there are {max(more) + 1} blocks",
            hint=HINT,
        )
    if plain and len(more) != stated:
        raise InputError(
            f"config.json's num_hidden_layers is {count}, but there are"
            f" {max(plain) + 1} blocks alike",
            hint=HINT,
        )


def _check_block(arch: Architecture, block: Block, specs: Specs) -> None:
    for branch in (block.mixer, block.feed_forward):
        made = branch.shapes(arch.hidden_size)
        sizes = f"hidden_size {arch.hidden_size}; {made.sizes}"
        for module, shape in made.of.items():
            wanted = shape[::-1] if arch.transposed else shape
            _check(specs, f"{module}.weight", wanted, sizes)
        for name, width in made.vectors.items():
            _check(specs, name, (width,), sizes)
        for name, (channels, tokens) in made.convolutions.items():
            _check(specs, name, (channels, 1, tokens), sizes)
        for part in _parts(branch):
            _check_vectors(specs, part)
    for norm in block.norms.values():
        _check_vectors(specs, norm, arch.hidden_size)


def _check_experts(arch: Architecture, block: Block, names: set[str]) -> None:
    """Refuse experts that config.json does not count. names: of the block's tensors"""
    experts = block.experts
    if experts is None:
        return
    known = {f"{module}.weight" for module in experts.shapes(arch.hidden_size).of}
    beyond = {name for name in names if is_expert(name) and name.endswith(".weight")} - known
    if beyond:
        raise InputError(
            f"config.json has {len(experts.experts)} experts, but there are others:"
            f" {fold_names(sorted(beyond))}",
            hint=HINT,
        )


def _check(specs: Specs, name: str, shape: tuple[int, ...], sizes: str) -> None:
    if name not in specs:
        raise InputError(f"no tensor {name!r}, which config.json asks for ({sizes})", hint=HINT)
    found = specs[name].shape
    if found != shape:
        raise InputError(
            f"tensor {name!r} is {list(found)}, but config.json makes it {list(shape)} ({sizes})",
            hint=HINT,
        )


def _check_vectors(specs: Specs, part: Linear | Norm, width: int | None = None) -> None:
    """Refuse a bias or a gain that is missing, or, where it is known, of another width."""
    gain = isinstance(part, Norm) and part.affine
    bias = part.bias and (gain or isinstance(part, Linear))
    for name in [f"{part.name}.weight"] * gain + [f"{part.name}.bias"] * bias:
        if name not in specs:
            raise InputError(f"no tensor {name!r}, which config.json asks for", hint=HINT)
        if width is not None:
            _check(specs, name, (width,), f"hidden_size {width}")


def _parts(value: Any) -> Iterator[Linear | Norm]:
    """The linears and norms that a branch is made of."""
    if isinstance(value, Linear | Norm):
        yield value
    elif isinstance(value, Mapping):
        yield from _parts(tuple(value.values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _parts(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _parts(getattr(value, field.name))
