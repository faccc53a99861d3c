"""Dequantization: the float model folder of a quantized one, tensor after tensor.

    for tensor: decode → round to the float dtype → its place in the output

What was not quantized is copied byte for byte. A killed run goes on with the tensors that are in
their places and decoded from the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from threadpoolctl import threadpool_limits

from ptq_cli.core.plugins import Format
from ptq_cli.core.progress import Progress
from ptq_cli.core.tensors import TensorSpec
from ptq_cli.formats.sources import with_dtype
from ptq_cli.numerics.parallel import use_threads
from ptq_cli.run.schedule import RunOptions
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.decoded import decoded_as
from ptq_cli.storage.experts import fused_again
from ptq_cli.storage.folder import MAX_SHARD, Assembly, begin_weights, write_folder
from ptq_cli.storage.machine import cores
from ptq_cli.storage.staging import Staging
from ptq_cli.storage.tensors import Bytes, as_bytes

FLOATS = Format(  # of a folder without one quantized layer
    name="float",
    help="",
    misfit=lambda layer: None,
    specs=lambda layer: (),
    encode=lambda layer, rounded: {},
    decode=lambda layer, tensors: _nothing(),
    layers=lambda contents: (),
    file_metadata={"format": "pt"},
)


def _nothing() -> Any:
    raise NotImplementedError("a float model has no layers to decode")


@dataclass(frozen=True)
class Dequantization:
    """A planned dequantization. source: with experts as they are stored; dtype: of what is decoded,
    None: what the source says of each tensor"""

    source: Checkpoint
    dtype: str | None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What is written."""
        return tuple(map(self._spec, self.source.tensors))

    def _spec(self, name: str) -> TensorSpec:
        spec = self.source.tensors[name].spec
        changes = self.dtype is not None and self.source.is_decoded(name)
        return replace(spec, dtype=self.dtype) if changes and self.dtype else spec

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the output."""
        config = self.source.config
        return config if self.dtype is None else with_dtype(config, self.dtype)


def planned(checkpoint: Checkpoint, dtype: str | None) -> Dequantization:
    """What is to be done with an opened source."""
    fused = {t.part_of.spec.name for t in checkpoint.tensors.values() if t.part_of is not None}
    return Dequantization(checkpoint.holding(fused_again(checkpoint.tensors, fused)), dtype)


def run_dequantize(job: Dequantization, staging: Staging, options: RunOptions) -> dict[str, Any]:
    """Decode every tensor; then the output gets its name. Raises PtqError.

    Returns: `tensors`, `decoded`, `bytes`, `seconds`.
    """
    begin, size = time.perf_counter(), sum(spec.nbytes for spec in job.specs)
    staging.check_space(0, size)
    parts = [(spec.name, [spec]) for spec in job.specs]
    shards = begin_weights(staging.out, parts, {}, FLOATS, options.max_shard or MAX_SHARD)
    assert shards is not None
    store = replace(staging.store, places=shards.places, placing=True)
    names = [name for name in job.source.tensors if job.source.is_decoded(name)]
    with threadpool_limits(1), use_threads(cores()):
        for done, name in enumerate(names, 1):
            key = {"tensor": {name: job.source.digest(name)}}
            kept = store.reusable(name, key)
            if not kept:
                start = time.perf_counter()
                tensor = _decoded(job, name)
                store.put(name, key, [tensor], None, time.perf_counter() - start)
            shards.take([name])
            options.listen(Progress("decode", done, len(names), name, kept=kept))
    left = (name for name in job.source.tensors if not job.source.is_decoded(name))
    shards.put(map(job.source.copyable, left))
    placed = [(name, [shards.places[name]]) for name in job.source.tensors]
    documents = {"config.json": job.config} if job.config else {}
    assembly = Assembly(placed, {}, (), FLOATS, documents, job.config)
    write_folder(staging.out, assembly, job.source, shards=shards, listen=options.listen)
    staging.publish()
    counts = {"tensors": len(placed), "decoded": len(names), "bytes": size}
    return counts | {"seconds": time.perf_counter() - begin}


def _decoded(job: Dequantization, name: str) -> Bytes:
    dtype = job.dtype or job.source.tensors[name].spec.dtype
    return as_bytes(name, decoded_as(job.source, name, dtype))
