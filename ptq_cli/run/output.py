"""The output folder of a quantization: laid out before the work, assembled after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ptq_cli._version import __version__
from ptq_cli.core.layer import Layer, Plan
from ptq_cli.core.report import RunReport
from ptq_cli.models.linears import dense_modules
from ptq_cli.registry import format_named
from ptq_cli.report.report import as_document
from ptq_cli.run.schedule import Resources
from ptq_cli.run.work import Work
from ptq_cli.storage.checkpoint import Checkpoint, StoredTensor
from ptq_cli.storage.folder import Assembly, begin_weights, container_of, write_folder
from ptq_cli.storage.shards import Shards
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import Bytes


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


def lay_out(staging: Staging, plan: Plan, checkpoint: Checkpoint, max_shard: int) -> Shards | None:
    """The weights files, to be filled while units are worked on; None where the container is
    written whole."""
    fmt = format_named(plan.format)
    layers = {layer.tensor: layer for layer in plan.layers}
    parts = [
        (layers[name].module, fmt.specs(layers[name])) if name in layers else (name, [own.spec])
        for name, own in checkpoint.tensors.items()
    ]
    of_module = {layer.module: layer for layer in plan.layers}
    return begin_weights(staging.out, parts, of_module, fmt, max_shard)


def write_output(work: Work, report: RunReport, shards: Shards | None) -> None:
    """Assemble the folder at its temporary place, and prove it equal to what was staged."""
    plan, staging = work.plan, work.staging
    fmt = format_named(plan.format)
    methods = {row.module: row.method for row in report.rows}
    layers = {layer.module: replace(layer, method=methods[layer.module]) for layer in plan.layers}
    staged: Mapping[str, Bytes | StoredTensor]
    if shards is not None:
        staged = shards.places  # where all is by now
    else:
        units = (work.store.tensors(unit.name) for unit in plan.units)
        staged = {tensor.spec.name: tensor for tensors in units for tensor in tensors}
    of_tensor = {layer.tensor: layer for layer in layers.values()}
    parts: list[tuple[str, list[Bytes | StoredTensor]]] = []
    for name, own in work.checkpoint.tensors.items():
        layer = of_tensor.get(name)
        if layer is None:
            parts.append((name, [own]))
        else:
            parts.append((layer.module, [staged[spec.name] for spec in fmt.specs(layer)]))
    documents = {
        "report.json": as_document(report, times=False),
        "quantization.json": quantization_document(
            plan, report.settings, work.job.inputs, layers.values()
        ),
    }
    assembly = Assembly(parts, layers, dense_modules(plan.skipped), fmt, documents)
    write_folder(staging.out, assembly, work.checkpoint, shards=shards, listen=work.options.listen)
    if work.smoothed is not None:
        work.smoothed.write(staging.out)


def quantization_document(
    plan: Plan, settings: Mapping[str, Any], inputs: Mapping[str, str], layers: Iterable[Layer]
) -> dict[str, Any]:
    """quantization.json: enough to know, and to repeat, what was done."""
    return {
        "ptq": __version__,
        "method": plan.method,
        "format": plan.format,
        "settings": dict(settings),
        "inputs": dict(inputs),
        "layers": {layer.module: layer.method for layer in layers},
    }
