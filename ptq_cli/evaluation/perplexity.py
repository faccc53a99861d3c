"""What quantization does to a model's predictions: perplexity, KL divergence, equal top tokens.

Several versions of a model run side by side over the same tokens, block by block: the original, the
quantized one, and plain rounding to nearest at the same grid, which shows what the method gained.
For `--kl-per-block`, one version more for each block, in which that block alone is quantized.

Standard errors are those of sequences drawn anew: the tokens of a sequence depend on each other, so
what they add to a mean is summed per sequence first (clustered by sequence), and differences are
taken token by token, so what both versions find hard cancels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ptq_cli.calibration.from_tokens import TokenSource, token_source
from ptq_cli.calibration.stream import Held, Read, Stream
from ptq_cli.core.progress import Listener, Progress, nobody
from ptq_cli.errors import InputError, NumericalError
from ptq_cli.evaluation.kv_cache import nearest_caches, stored_caches
from ptq_cli.models.forward.layers import Tensor
from ptq_cli.models.forward.likelihood import Prediction, TokenMeasures, measure_tokens, next_tokens
from ptq_cli.models.forward.linear import as_tensor
from ptq_cli.models.forward.stages import finish
from ptq_cli.numerics.rounding import grid_by_zeros, round_to_nearest
from ptq_cli.numerics.weak_inputs import FEWEST_HELDOUT
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.output import check_free, free_space
from ptq_cli.storage.quantized import QuantizedFolder
from ptq_cli.storage.scratch import Rows, temporary_folder, temporary_place
from ptq_cli.storage.tokens import Tokens

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class _Version:
    """A model on its way. block: the one that is not the original's, or None for all."""

    name: str
    stream: Stream
    block: int | None = None


def measure_quality(
    original: Checkpoint,
    quantized: QuantizedFolder,
    tokens: Tokens,
    *,
    per_block: bool = False,
    listen: Listener = nobody,
) -> dict[str, Any]:
    """Run the models over `tokens`; gives the report's `quality` object.

    Raises:
        InputError: an architecture without a forward, or sequences without a next token.
    """
    source = token_source(original, tokens, (0, 0))
    n_blocks = len(source.arch.blocks)
    if not any(len(next_tokens(batch.tokens, batch.packing)[0]) for batch in source.batches):
        raise InputError(f"{tokens.name}: no sequence has a token to predict")
    blocks = range(n_blocks if per_block else 0)
    needed = (3 + len(blocks)) * source.residual_bytes
    check_free(temporary_place(), needed, free_space(temporary_place()))
    with temporary_folder() as work, threadpool_limits(1):
        versions = _versions(source, quantized, work, blocks)
        ends = _run(versions, n_blocks, listen)
        quality = _summary(versions, ends, listen)
    weak = list(tokens.weak)
    if quality["tokens"] < FEWEST_HELDOUT:
        weak.append(f"only {quality['tokens']} tokens are predicted")
    return quality | ({"weak": weak} if weak else {})


def _versions(
    source: TokenSource, quantized: QuantizedFolder, work: Path, blocks: Iterable[int]
) -> list[_Version]:
    original, n_threads = source.checkpoint, source.n_threads()
    rounded = quantized_tensors(original, quantized)
    caches = stored_caches(source.attentions, quantized)
    plain = nearest_caches(caches, quantized.kv_cache)
    reads: list[tuple[str, Read, int | None]] = [
        ("original", original.read, None),
        ("quantized", rounded, None),
        ("rtn", nearest_tensors(original, quantized), None),
    ]
    reads += [(f"block {block}", rounded, block) for block in blocks]
    versions = [
        _Version(name, Stream(name, read, source, work, n_threads), block)
        for name, read, block in reads
    ]
    for version in versions[1:]:
        own = plain if version.name == "rtn" else caches
        version.stream.caches = {k: v for k, v in own.items() if version.block in (None, k)}
    return versions


def quantized_tensors(original: Checkpoint, quantized: QuantizedFolder) -> Read:
    """Tensors as the quantized folder has them, decoded; with them how inputs are rounded."""
    layers = {layer.tensor: layer for layer in quantized.layers.values()}

    def read(name: str) -> Tensor:
        if name in layers:
            return as_tensor(layers[name], quantized.load(layers[name].module))
        present = name in quantized.checkpoint.tensors
        return (quantized.checkpoint if present else original).read(name)

    return read


def nearest_tensors(original: Checkpoint, quantized: QuantizedFolder) -> Read:
    """The original's tensors, those of quantized layers rounded to nearest at the same grid, and
    inputs rounded as there; a static scale, which belongs to what was quantized, is found anew in
    every batch."""
    layers = {layer.tensor: layer for layer in quantized.layers.values()}

    def read(name: str) -> Tensor:
        if name not in layers:
            return original.read(name)
        layer = layers[name]
        ours = quantized.load(layer.module)
        rounded = round_to_nearest(original.weight(layer), grid_by_zeros(ours))
        rounded = replace(rounded, input_scale=ours.input_scale)
        inputs = layer.activation
        if inputs is not None and not inputs.dynamic:
            inputs = replace(inputs, dynamic=True, per_token=False)
        return as_tensor(replace(layer, activation=inputs), rounded)

    return read


def _run(versions: list[_Version], n_blocks: int, listen: Listener) -> dict[str, Rows]:
    """Take every version through all blocks; gives where each one's last residual is."""
    at: dict[str, Rows] = {}
    total, done = sum(n_blocks - (version.block or 0) for version in versions), 0
    listen(Progress("run", 0, total))
    for version in versions:
        if version.block is None:
            version.stream.embed()
            at[version.name] = version.stream.boundary(0)
    for block in range(n_blocks):
        before, exact = dict(at), versions[0].stream.read
        for version in versions:
            alone = block if version.block is None else version.block
            if alone > block:
                continue
            if alone < block:
                version.stream.read = exact
            source = before.get(version.name, before["original"])
            at[version.name] = version.stream.cross(block, source)
            done += 1
            listen(Progress("run", done, total, f"block {block}, {version.name}"))
        for rows in before.values():
            rows.drop()
    return at


def _summary(
    versions: list[_Version], ends: Mapping[str, Rows], listen: Listener
) -> dict[str, Any]:
    sequence, measures = _predictions(versions, ends, listen)
    blocks = [version for version in versions if version.block is not None]
    own = {v.name: measures[v.name] for v in versions[1:] if v.block is None}
    nll = {"original": own["quantized"].reference_nll} | {name: m.nll for name, m in own.items()}
    for name in ("original", "quantized"):
        if not np.isfinite(nll[name]).all():
            raise NumericalError(
                f"what the {name} model predicts is not finite: a weight that stayed dense is NaN"
                " or inf, or the model overflows"
            )
    quality: dict[str, Any] = {
        "tokens": len(sequence),
        "sequences": len(np.unique(sequence)),
        "perplexity": {name: float(np.exp(values.mean())) for name, values in nll.items()},
        "increase": {name: difference(nll[name], nll["original"], sequence) for name in own},
        "quantized_minus_rtn": difference(nll["quantized"], nll["rtn"], sequence),
        "kl": {
            name: {
                "mean": float(m.kl.mean()),
                "standard_error": clustered_error(m.kl, sequence),
                "p99_9": float(np.quantile(m.kl, 0.999)),
            }
            for name, m in own.items()
        },
        "same_top": {name: m.same_top for name, m in own.items()},
    }
    if blocks:
        quality["kl_per_block"] = [float(measures[v.name].kl.mean()) for v in blocks]
    return quality


def _predictions(
    versions: list[_Version], ends: Mapping[str, Rows], listen: Listener
) -> tuple[NDArray[np.int64], dict[str, TokenMeasures]]:
    """Which sequence each predicted token is in, and the measures of each version but the first,
    per predicted token over all batches."""
    arch, batches = versions[0].stream.arch, versions[0].stream.batches
    heads = {v.name: Held(v.stream.read, float32=False) for v in versions if v.block is None}
    found: dict[str, list[TokenMeasures]] = {version.name: [] for version in versions[1:]}
    sequences, first = [], 0
    listen(Progress("predict", 0, len(batches)))
    for number, batch in enumerate(batches, 1):
        rows, targets = next_tokens(batch.tokens, batch.packing)
        predicted = {}
        for name, end in ends.items():
            head = heads.get(name, heads["original"])
            finished = finish(arch, head, end.read(batch.rows))
            predicted[name] = Prediction(arch, head, finished[rows])
        for name, measures in found.items():
            measures.append(measure_tokens(predicted[name], targets, predicted["original"]))
        sequences.append(first + np.searchsorted(batch.packing.starts, rows, side="right"))
        first += len(batch.tokens)
        listen(Progress("predict", number, len(batches), f"batch {number}"))
    joined = {
        name: TokenMeasures(
            *(
                np.concatenate([getattr(part, field.name) for part in measures])
                for field in fields(TokenMeasures)
            )
        )
        for name, measures in found.items()
    }
    return np.concatenate(sequences), joined


def difference(ours: Doubles, theirs: Doubles, sequence: NDArray[np.int64]) -> dict[str, Any]:
    """exp(mean ours) − exp(mean theirs), and its standard error, clustered by sequence.

    ours, theirs: negative log-likelihoods [n] of the same tokens; sequence: [n]
    By the delta method a token adds `ppl·(nll − mean)` of either side to the difference.
    """
    perplexity = [float(np.exp(nll.mean())) for nll in (ours, theirs)]
    parts = [p * nll for p, nll in zip(perplexity, (ours, theirs), strict=True)]
    spread = clustered_error(parts[0] - parts[1], sequence)
    return {"perplexity": perplexity[0] - perplexity[1], "standard_error": spread}


def clustered_error(values: Doubles, sequence: NDArray[np.int64]) -> float | None:
    """Standard error of the mean of values [n] of tokens, clustered by sequence [n]; None where
    there is one sequence only."""
    _, cluster = np.unique(sequence, return_inverse=True)
    sums = np.bincount(cluster, values - values.mean())
    count = len(sums)
    if count < 2:
        return None
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))
