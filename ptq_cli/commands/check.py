"""`ptq check`, and the same facts as warnings while quantizing."""

from __future__ import annotations

from pathlib import Path

from ptq_cli.core.layer import Plan, Skipped
from ptq_cli.formats.runtimes import NOTE, Artifact, Fact, facts
from ptq_cli.models.experts import experts_to_fuse
from ptq_cli.models.linears import dense_modules, module_tree
from ptq_cli.registry import format_named
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import listing
from ptq_cli.storage.folder import declared_config, open_quantized


def check(quantized: str | Path, runtime: str) -> tuple[str, list[Fact]]:
    """The format of an output, and what a runtime makes of it, from files alone."""
    folder = open_quantized(Path(quantized))
    untouched = [
        Skipped(name, spec.shape, spec.dtype, "")
        for name in folder.untouched()
        for spec in (folder.checkpoint.tensors[name].spec,)
    ]
    config, dense = declared_config(folder.checkpoint), dense_modules(untouched)
    artifact = Artifact(
        folder.fmt.name,
        list(folder.layers.values()),
        dense,
        config,
        listing(folder.checkpoint.folder),
        experts_to_fuse(config, (*folder.layers, *dense)),
    )
    return folder.fmt.name, facts(artifact, runtime)


def runtime_warnings(plan: Plan, checkpoint: Checkpoint, runtime: str | None) -> tuple[str, ...]:
    """What `check` would say of the output of a plan, but for mere notes."""
    if runtime is None:
        return ()
    fmt, dense = format_named(plan.format), dense_modules(plan.skipped)
    declared = fmt.config(plan.layers, dense, module_tree(checkpoint.config))
    config = dict(checkpoint.config)
    if declared is not None:
        config |= {**fmt.model_config(config), **dict.fromkeys(fmt.config_keys, declared)}
    files = [] if checkpoint.root is None else listing(checkpoint.root)
    modules = (*(layer.module for layer in plan.layers), *dense)
    fused = experts_to_fuse(config, modules)
    artifact = Artifact(plan.format, plan.layers, dense, config, files, fused)
    found = [fact for fact in facts(artifact, runtime) if fact.level != NOTE]
    return tuple(f"{runtime}: {fact}" for fact in found)
