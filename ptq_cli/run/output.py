"""The output folder of a quantization: laid out before the work, assembled after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.report import RunReport
from ptq_cli.models.linears import dense_modules
from ptq_cli.registry import format_named
from ptq_cli.report.report import as_document
from ptq_cli.run.schedule import Resources
from ptq_cli.run.work import Quantization, Work
from ptq_cli.storage.checkpoint import StoredTensor
from ptq_cli.storage.folded import FOLDS_FILE, write_folds
from ptq_cli.storage.folder import MAX_SHARD, Assembly, begin_weights, container_of, write_folder
from ptq_cli.storage.gguf_model import GgufOutput
from ptq_cli.storage.shards import Part, Shards
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import Bytes
from ptq_cli.storage.weights_size import weights_size


def is_placing(plan: Plan, resources: Resources) -> bool:
    """Whether units go to their places in the output's files at once. Hosts that write to one file
    of a shared file system could spoil one another's pages."""
    return container_of(format_named(plan.format)).filled and resources.scheduler is None


def staged_bytes(plan: Plan, resources: Resources) -> int:
    """Bytes of finished units that lie beside the output."""
    if is_placing(plan, resources):
        return 0
    specs = format_named(plan.format).specs
    return sum(spec.nbytes for layer in plan.layers for spec in specs(layer))


def lay_out(staging: Staging, job: Quantization, max_shard: int | None) -> Shards | None:
    """The weights files, to be filled while units are worked on; None where the container is
    written whole."""
    layers, fmt = {layer.module: layer for layer in job.plan.layers}, format_named(job.plan.format)
    size = max_shard or MAX_SHARD
    return begin_weights(staging.out, _parts(job.plan, job.written), layers, fmt, size)


def weights_bytes(
    job: Quantization, max_shard: int | None = None, said: Mapping[str, Any] = {}
) -> int:
    """Bytes that the weights files of the output will have. said: of the run, in a GGUF file"""
    method = max(job.rounding.method, "rtn", key=len)  # the longest word of the metadata
    method = method if job.smoothing is None else f"{job.command}+{method}"
    layers = {layer.module: replace(layer, method=method) for layer in job.plan.layers}
    fmt, parts = format_named(job.plan.format), _parts(job.plan, job.written)
    if job.checkpoint.gguf is not None and not container_of(fmt).filled:  # all else is copied
        parts = [(name, specs) for name, specs in parts if name in layers]
    place = GgufOutput(Path(), max_shard, said, job.plan.types)
    return weights_size(job.checkpoint, parts, layers, fmt, place)


def _parts(plan: Plan, written: Mapping[str, StoredTensor]) -> list[Part]:
    """Modules that are quantized and tensors that are not, in the order of the checkpoint; then the
    attentions whose cache is rounded."""
    specs = format_named(plan.format).specs
    layers = {layer.tensor: layer for layer in plan.layers}
    parts: list[Part] = [
        (layers[name].module, specs(layers[name])) if name in layers else (name, [own.spec])
        for name, own in written.items()
    ]
    if plan.kv_cache is not None:
        parts += [(module, plan.kv_cache.specs_of(module)) for module in plan.kv_cache.modules]
    return parts


def write_output(work: Work, report: RunReport, shards: Shards | None) -> None:
    """Assemble the folder at its temporary place, and prove it equal to what was staged."""
    plan, staging = work.plan, work.staging
    methods = {row.module: row.method for row in report.rows}
    layers = {layer.module: replace(layer, method=methods[layer.module]) for layer in plan.layers}
    written = written_anew(work)
    tensors: dict[str, Bytes | StoredTensor] = dict(written)
    if shards is not None:
        tensors |= shards.places  # where all is by now
    else:
        rounded, held = {layer.tensor for layer in plan.layers}, work.checkpoint
        left = [name for name in held.tensors if name in written and name not in rounded]
        tensors |= {name: held.copyable(name) for name in left}
        for unit in plan.units:
            tensors |= {tensor.spec.name: tensor for tensor in work.store.tensors(unit.name)}
    parts = [
        (name, [tensors[spec.name] for spec in specs]) for name, specs in _parts(plan, written)
    ]
    documents = run_documents(plan, report, work.job.inputs, layers.values())
    fmt, dense = format_named(plan.format), dense_modules(plan.skipped)
    assembly = Assembly(
        parts, layers, dense, fmt, documents, kv_cache=plan.kv_cache, types=plan.types,
        alone=staging.said(documents["report.json"]),
    )  # fmt: skip
    options = work.options
    write_folder(staging.out, assembly, work.checkpoint, options.max_shard, shards, options.listen)
    if work.smoothed is not None and work.smoothed.folds:  # an evaluation needs them
        write_folds(staging.out / FOLDS_FILE, work.smoothed.folds)


def written_anew(work: Work) -> Mapping[str, StoredTensor]:
    """The tensors that are written, rounded ones included: all, but of a GGUF file that becomes
    another those alone that are no longer as they lie in it."""
    written, view = work.job.written, work.checkpoint.gguf
    if view is None or container_of(format_named(work.plan.format)).filled:
        return written
    anew = {layer.tensor for layer in work.plan.layers}
    anew |= {*view.changed({name: own.file for name, own in work.checkpoint.tensors.items()})}
    return {name: own for name, own in work.checkpoint.tensors.items() if name in anew}


def run_documents(
    plan: Plan, report: RunReport, inputs: Mapping[str, str], layers: Iterable[Layer]
) -> dict[str, Any]:
    """report.json, and quantization.json: enough to know, and to repeat, what was done."""
    quantization = {
        "ptq": __version__,
        "method": plan.method,
        "format": plan.format,
        "settings": dict(report.settings),
        "inputs": dict(inputs),
        "layers": {layer.module: layer.method for layer in layers},
    }
    return {"report.json": as_document(report, times=False), "quantization.json": quantization}
