"""What a page shows of one run: its report, and what the output folder and statistics add to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import Source
from ptq_cli.report.gates import Gate
from ptq_cli.report.report import JsonObject, row_error
from ptq_cli.storage.folded import read_folds
from ptq_cli.storage.made import REPORT
from ptq_cli.storage.quantized import QuantizedFolder, open_quantized
from ptq_cli.storage.reports import read_report

WORST = 3  # layers whose codes and scales are shown, sites whose channels are
_SCALE_BINS = 24


@dataclass(frozen=True)
class Distribution:
    """Codes and scales of one layer.

    codes: int64 [2^bits], how often each stands
    scales: int64 [bins], how many lie between `edges`, float64 [bins + 1]
    """

    module: str
    codes: NDArray[np.int64]
    scales: NDArray[np.int64]
    edges: NDArray[np.float64]


@dataclass(frozen=True)
class Channels:
    """The largest absolute input of each channel of a site, float32 [in_features].

    smoothed: the same after the factors that the folder holds for the site, or None
    """

    site: str
    absmax: NDArray[np.float32]
    smoothed: NDArray[np.float32] | None = None

    @property
    def loudness(self) -> float:
        """The loudest channel over the median one; 0 where that is silent."""
        median = float(np.median(self.absmax))
        return float(self.absmax.max()) / median if median > 0 else 0.0


@dataclass(frozen=True)
class Subject:
    """One run on a page.

    label: its short name; document: the report as JSON (report.schema.json)
    gates: as they were set on the command line
    """

    label: str
    document: JsonObject
    gates: tuple[Gate, ...] = ()
    distributions: tuple[Distribution, ...] = ()
    channels: tuple[Channels, ...] = ()


def open_subjects(paths: Sequence[Path], source: Source | None = None) -> tuple[Subject, ...]:
    """Runs from their output folders, or from their reports alone; labels tell them apart. What is
    read beside the reports belongs to the page of one run.

    Raises:
        InputError: no report; damaged weights.
    """
    documents, folders = zip(*map(read_report, paths), strict=True)
    if len(paths) > 1:
        return tuple(map(Subject, _labels(paths), documents))
    return (subject_of(documents[0], _labels(paths)[0], folders[0], source),)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The folder's or file's name; where two are alike, as much of the path as tells them apart."""
    whole = [(p.parent if p.name == REPORT else p).resolve() for p in paths]
    for count in range(1, max(len(path.parts) for path in whole) + 1):
        labels = ["/".join(path.parts[-count:]).removesuffix(".json") for path in whole]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, 1)]


def subject_of(
    document: JsonObject,
    label: str,
    folder: Path | None,
    source: Source | None,
    gates: Sequence[Gate] = (),
) -> Subject:
    """A run from its report, what it wrote, and the statistics it had."""
    worst = [row["module"] for row in worst_first(document["layers"])]
    distributions: list[Distribution] = []
    if folder is not None and worst:
        quantized = open_quantized(folder)
        there = [module for module in worst if module in quantized.layers]
        distributions += [_distribution(quantized, module) for module in there[:WORST]]
    channels = _channels(source, worst[:WORST], folder)
    return Subject(label, document, tuple(gates), tuple(distributions), channels)


def worst_first(rows: Iterable[JsonObject]) -> list[JsonObject]:
    return sorted(rows, key=lambda row: (-row_error(row), row["module"]))


def _distribution(folder: QuantizedFolder, module: str) -> Distribution:
    weight = folder.load(module)
    codes = np.bincount(weight.codes.reshape(-1), minlength=1 << weight.grid.bits)
    scales = np.abs(weight.float_scales().astype(np.float64)).reshape(-1)
    low, high = float(scales.min()), float(scales.max())
    if low < high:
        space = np.geomspace if low > 0 and high > 8 * low else np.linspace
        edges = space(low, high, _SCALE_BINS + 1)
    else:
        edges = np.array([low * 0.9, low * 1.1]) if low else np.array([0.0, 1.0])
    return Distribution(module, codes, np.histogram(scales, edges)[0], edges)


def _channels(
    source: Source | None, worst: Sequence[str], folder: Path | None
) -> tuple[Channels, ...]:
    """The sites with the loudest channels: of all in a statistics file; where activations have to
    be read again, of the sites of the worst modules. Empty where the statistics are gone (--tokens
    makes them on the way)."""
    if source is None:
        return ()
    found, factors = [], {}
    if folder is not None:
        folds = read_folds(folder if folder.is_dir() else folder.parent)
        factors = {linear.module: values for site, values in folds for linear in site.linears}
    for site, absmax in source.ranges(worst):
        own = next((factors[m] for m in source.sites[site].linears if m in factors), None)
        smoothed = None if own is None or own.shape != absmax.shape else absmax / own
        found.append(Channels(site, absmax, smoothed))
    return tuple(sorted(found, key=lambda c: (-c.loudness, c.site))[:WORST])
