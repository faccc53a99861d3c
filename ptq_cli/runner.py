"""THE loop: units in, a finished folder out.

- All work of a run lies in `<output>.partial/` (storage/staging.py). A finished unit survives a
  kill; the same command goes on after it; a run with other settings or inputs is refused.
- A unit is worked on from names: its weights and statistics are read inside, only report rows come
  back.
- BLAS has one thread: its bits then depend on no thread count, and small products do not suffer
  from a shared machine.
- The output is assembled from the staged units, read back, compared, and renamed in one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ptq_cli._version import __version__
from ptq_cli.errors import NumericalError, PtqError
from ptq_cli.plan import dense_modules
from ptq_cli.registry import format_named, method
from ptq_cli.report import as_document, make_report, row_from_json
from ptq_cli.storage.calibration import NoTokens, StatisticsSource, StreamingSource
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folder import Assembly, mapped, write_folder
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import as_array, as_bytes
from ptq_cli.unit import quantize_unit
from ptq_cli.values import FloatArray, Layer, LayerReport, Plan, RunReport, Unit


@dataclass(frozen=True)
class Progress:
    """Told of every finished layer: how many are done, of how many, and its row."""

    done: int
    total: int
    row: LayerReport


Listener = Callable[[Progress], None]


def run(
    plan: Plan,
    checkpoint: Checkpoint,
    source: StatisticsSource | None,
    staging: Staging,
    *,
    command: str,
    on_failure: str = "error",
    inputs: Mapping[str, str] | None = None,
    listen: Listener = lambda _: None,
) -> RunReport:
    """Work through the plan and give the output its name.

    inputs: fingerprints of the inputs, for quantization.json

    Raises:
        PtqError: what a unit met; the work folder is removed.
    """
    begin = time.perf_counter()
    try:
        with threadpool_limits(1):
            rows = _run_units(plan, checkpoint, source, staging, on_failure, listen)
        report = make_report(command, plan, rows, time.perf_counter() - begin)
        _assemble(plan, checkpoint, staging, report, inputs or {})
        staging.publish()
    except PtqError:
        staging.drop()
        raise
    finally:
        staging.close()
    seconds = time.perf_counter() - begin
    return replace(report, totals={**report.totals, "seconds": seconds})


def _run_units(
    plan: Plan,
    checkpoint: Checkpoint,
    source: StatisticsSource | None,
    staging: Staging,
    on_failure: str,
    listen: Listener,
) -> list[LayerReport]:
    rows: dict[str, LayerReport] = {}
    total = len(plan.layers)
    if isinstance(source, StreamingSource):
        source.begin(staging.folder / "stream", _rounded(plan, staging))
    for unit in plan.units:
        if not staging.finished(unit.name):
            _work(unit, plan, checkpoint, source, staging, on_failure)
        for entry in staging.result(unit.name):
            row = row_from_json(entry)
            rows[row.module] = row
            listen(Progress(len(rows), total, row))
    return [rows[layer.module] for layer in plan.layers]


def _work(
    unit: Unit,
    plan: Plan,
    checkpoint: Checkpoint,
    source: StatisticsSource | None,
    staging: Staging,
    on_failure: str,
) -> None:
    """Read, quantize and stage one unit."""

    def load(layer: Layer) -> NDArray[np.float32]:
        return checkpoint.matrix(layer.tensor, layer.shape)

    statistics = None
    try:
        if source is not None and unit.site is not None:
            statistics = source.load(unit.site)
    except NoTokens:
        unit = replace(unit, nearest="no token reaches it")
    try:
        results = quantize_unit(
            unit,
            statistics,
            load,
            method(plan.method),
            plan.settings[1],
            format_named(plan.format),
            on_failure=on_failure,
        )
    except NumericalError as error:
        error.hint = f"{error.hint}, or allow --fallback rtn"
        raise
    tensors = [
        as_bytes(name, values) for result in results for name, values in result.tensors.items()
    ]
    staging.put(unit.name, tensors, [asdict(result.row) for result in results])


def _rounded(plan: Plan, staging: Staging) -> Callable[[str], FloatArray | None]:
    """What a layer's tensor decodes to, once its unit is finished."""
    fmt = format_named(plan.format)
    place = {layer.tensor: (unit, layer) for unit in plan.units for layer in unit.layers}

    def rounded(tensor: str) -> FloatArray | None:
        if tensor not in place or not staging.finished(place[tensor][0].name):
            return None
        unit, layer = place[tensor]
        wanted = {spec.name for spec in fmt.specs(layer)}
        staged = staging.tensors(unit.name)
        tensors = {t.spec.name: as_array(t) for t in staged if t.spec.name in wanted}
        return fmt.decode(layer, tensors).dequantized().reshape(layer.full_shape)

    return rounded


def _assemble(
    plan: Plan,
    checkpoint: Checkpoint,
    staging: Staging,
    report: RunReport,
    inputs: Mapping[str, str],
) -> None:
    fmt = format_named(plan.format)
    methods = {row.module: row.method for row in report.rows}
    layers = {layer.module: replace(layer, method=methods[layer.module]) for layer in plan.layers}
    of_tensor = {layer.tensor: layer for layer in layers.values()}
    staged = {
        tensor.spec.name: tensor for unit in plan.units for tensor in staging.tensors(unit.name)
    }
    parts = []
    for name in checkpoint.tensors:
        layer = of_tensor.get(name)
        if layer is None:
            parts.append((name, [mapped(checkpoint, name)]))
        else:
            parts.append((layer.module, [staged[spec.name] for spec in fmt.specs(layer)]))
    dense = dense_modules(plan.skipped)
    documents = {
        "report.json": as_document(report, times=False),
        "quantization.json": quantization_document(plan, report.settings, inputs, layers.values()),
    }
    write_folder(staging.out, Assembly(parts, layers, dense, fmt, documents), checkpoint)


def quantization_document(
    plan: Plan,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    layers: Sequence[Layer] | Any,
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
