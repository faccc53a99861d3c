"""How many bytes the weights files of an output will have, headers and all, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ptq_cli.core.layer import Layer
from ptq_cli.core.plugins import Format
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.folder import MAX_SHARD, container_of, longest_metadata
from ptq_cli.storage.gguf_model import GgufOutput, gguf_model_size
from ptq_cli.storage.shards import Part, lay_out, mapped
from ptq_cli.storage.tensors import Bytes


def weights_size(
    source: Checkpoint,
    parts: Sequence[Part],
    layers: Mapping[str, Layer],
    fmt: Format,
    place: GgufOutput,
) -> int:
    """Bytes of all weights files.

    parts: modules that are quantized and tensors that are not, in the order of the output
    layers: by module; place: of a GGUF file, of which others than that have `max_shard`
    """
    if container_of(fmt).filled:
        most = place.max_shard or MAX_SHARD
        shards = lay_out(Path(), parts, longest_metadata(layers, fmt), most)
        return sum(shard.size for shard in shards)
    nothing = np.zeros(1, np.uint8)
    whole = []
    for name, specs in parts:
        if name in layers:
            own = [Bytes(spec, np.broadcast_to(nothing, spec.nbytes)) for spec in specs]
        else:
            own = [mapped(source.copyable(name))]
        whole.append((name, own))
    return gguf_model_size(place, whole, layers, fmt, source)
