"""`ptq check`, and the same facts as warnings while quantizing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptq_cli.core.layer import Layer, Plan, Skipped
from ptq_cli.core.plugins import Format
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError
from ptq_cli.formats import common
from ptq_cli.formats.runtimes import LOADED, UNTRIED, facts, verdict
from ptq_cli.formats.runtimes.artifact import NOTE, Artifact, Fact
from ptq_cli.models.experts import experts_to_fuse
from ptq_cli.models.gguf_names import names_of_model
from ptq_cli.models.gguf_tensors import ARCHITECTURE
from ptq_cli.models.linears import dense_modules, left_alone, module_tree
from ptq_cli.models.ties import ties, untied
from ptq_cli.registry import FORMATS, format_named
from ptq_cli.run.repack import may_become
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing
from ptq_cli.storage.gguf_file import read_gguf_header
from ptq_cli.storage.gguf_model import check_model
from ptq_cli.storage.quantized import QuantizedFolder, declared_config, open_quantized


@dataclass(frozen=True)
class Checked:
    """What a runtime makes of an output.

    verdict: "loaded in our tests", "known not to load" or "not tried"
    why: it is not the first
    """

    format: str
    verdict: str
    why: str | None
    facts: Sequence[Fact]

    @property
    def loads(self) -> bool | None:
        """None where nobody tried."""
        return None if self.verdict == UNTRIED else self.verdict == LOADED


def check(quantized: str | Path, runtime: str) -> Checked:
    """What a runtime makes of an output, from files alone."""
    folder = open_quantized(Path(quantized))
    untouched = [
        Skipped(name, spec.shape, spec.dtype, "")
        for name in folder.untouched()
        for spec in (folder.checkpoint.tensors[name].spec,)
    ]
    layers, config = list(folder.layers.values()), _config(folder)
    files = listing(folder.checkpoint.folder)
    artifact = _artifact(folder.fmt, layers, untouched, config, files)
    other = _readable(artifact, runtime, lambda fmt: may_become(folder, fmt))
    return _checked(replace(artifact, repack=other), runtime)


def _checked(artifact: Artifact, runtime: str) -> Checked:
    found = facts(artifact, runtime)
    return Checked(artifact.format, *verdict(artifact, runtime, found), found)


def _config(folder: QuantizedFolder) -> Mapping[str, Any]:
    """config.json; of a GGUF file, the architecture that it names goes before that of another."""
    config = declared_config(folder.checkpoint)
    if folder.fmt.container != "gguf":
        return config
    architecture = read_gguf_header(folder.checkpoint.path).metadata.get(ARCHITECTURE)
    with suppress(InputError):
        if names_of_model(config).architecture == architecture:
            return config
    return {**config, "model_type": architecture}


def _artifact(
    fmt: Format,
    layers: Sequence[Layer],
    skipped: Sequence[Skipped],
    config: Mapping[str, Any],
    files: Sequence[str],
) -> Artifact:
    specs = {
        layer.tensor: TensorSpec(layer.tensor, layer.dtype, layer.full_shape) for layer in layers
    }
    specs |= {entry.tensor: TensorSpec(entry.tensor, entry.dtype, entry.shape) for entry in skipped}
    reasons, dense = left_alone(specs, config), dense_modules(skipped)
    modules = (*(layer.module for layer in layers), *dense)
    return Artifact(
        fmt.name,
        layers,
        dense,
        config,
        files,
        experts_to_fuse(config, modules),
        kinds={name.removesuffix(".weight"): why for name, why in reasons.items()},
        tree=module_tree(config),
        tied=ties(config) if config else False,
    )


def _readable(
    artifact: Artifact, runtime: str, may_hold: Callable[[Format], bool]
) -> list[str] | None:
    """Formats that could hold the layers, where the runtime does not load this one."""
    if verdict(artifact, runtime, facts(artifact, runtime))[0] in (LOADED, UNTRIED):
        return None
    return [name for name in FORMATS if name != artifact.format and may_hold(format_named(name))]


def runtime_warnings(
    plan: Plan, checkpoint: Checkpoint, runtime: str | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `check` would say of the output of a plan, but for mere notes; and that nobody tried."""
    if runtime is None:
        return (), ()
    fmt, dense = format_named(plan.format), dense_modules(plan.skipped)
    config = dict(untied(checkpoint.config, [layer.module for layer in plan.layers], dense))
    declared = fmt.config(plan.layers, dense, module_tree(config))
    if declared is not None:
        config |= {**fmt.model_config(config), **dict.fromkeys(fmt.config_keys, declared)}
    files = list(checkpoint.documents) if checkpoint.root is None else listing(checkpoint.root)
    artifact = _artifact(fmt, plan.layers, plan.skipped, config, files)

    def may_hold(other: Format) -> bool:
        own = [_with_scales_of(layer, other) for layer in plan.layers]
        if any(map(other.misfit, own)):
            return False
        return other.container != "gguf" or _in_gguf(checkpoint, own, plan.skipped)

    other = _readable(artifact, runtime, may_hold)
    found = _checked(replace(artifact, repack=other), runtime)
    said = tuple(f"{runtime}: {fact}" for fact in found.facts if fact.level != NOTE)
    untried = (f"{runtime}: {UNTRIED}: {found.why}",) if found.verdict == UNTRIED else ()
    return said, untried


def _with_scales_of(layer: Layer, fmt: Format) -> Layer:
    """A layer with the scales that a format wants, where they are plain floats."""
    if layer.grid.scale_dtype not in common.SCALE_WORDS:
        return layer
    return replace(layer, grid=replace(layer.grid, scale_dtype=fmt.scale_dtype(layer.dtype)))


def _in_gguf(checkpoint: Checkpoint, layers: Sequence[Layer], skipped: Sequence[Skipped]) -> bool:
    try:
        check_model(checkpoint, layers, [entry.tensor for entry in skipped])
    except InputError:
        return False
    return True
