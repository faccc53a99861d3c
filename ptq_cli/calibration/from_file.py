"""The statistics file.

A statistics file is a safetensors file. Per site `<site>`:

    <site>.hessian    F32 [in_features, in_features]
    <site>.absmax     F32 [in_features]
    <site>.absmean    F32 [in_features]
    <site>.histogram  I64 [bins], counts of |value| (numerics/statistics.py states the bins)
    <site>.heldout    F16, BF16 or F32 [n, in_features], inputs that no statistic has seen
    <site>.sample     the same, evenly spaced inputs that the statistics have seen

Per module whose gradients were given:

    <module>.fisher   F32 in the shape of its weight, the diagonal Fisher information mean_n g²

Scalars stand in the metadata, one key `ptq`, sorted JSON: `kind`, `version`, `model` (the
fingerprint of the weights), `heldout_every`, `heldout_limit`, and under `sites` for each site
`linears`, `n_tokens`, `n_seen`, `min`, `max`, `mean`, `std`, `p99`, `static_scale`,
`histogram_start`; under `fisher` the samples behind each module's. Where errors measured on the
inputs say little, `weak` says why, and so it does for a site (numerics/weak_inputs.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.source import FisherInfo, Parts, Ranges, Source, only_entry
from ptq_cli.core.statistics import Distribution, SiteInfo, SiteStatistics
from ptq_cli.core.tensors import Array, is_float
from ptq_cli.errors import InputError
from ptq_cli.numerics.distribution import percentile, static_scale
from ptq_cli.numerics.weak_inputs import weak_inputs, without_natural_repeats
from ptq_cli.storage.checkpoint import Checkpoint, open_checkpoint
from ptq_cli.storage.digest import Digest
from ptq_cli.storage.files import listing
from ptq_cli.storage.tensors import Bytes, as_bytes
from ptq_cli.storage.weights import SUFFIX

VERSION = 2

PARTS = ("hessian", "absmax", "absmean", "histogram", "heldout", "sample")


@dataclass(frozen=True)
class CalibrationFile(Source):
    """An opened statistics file. model: the fingerprint of the weights"""

    checkpoint: Checkpoint
    content: Mapping[str, Any]
    model: str

    @cached_property
    def fingerprints(self) -> Sequence[str]:
        return [self.checkpoint.fingerprint]

    def _read(self, name: str) -> Array:
        """A tensor. Raises InputError where it holds NaN or inf, which no calibration writes."""
        values = self.checkpoint.read(name)
        if not np.isfinite(values.sum(dtype=np.float64)):
            raise self._damaged(name)
        return values

    def _damaged(self, tensor: str) -> InputError:
        return InputError(f"{self.name}: {tensor} is damaged", hint="calibrate again")

    def load_fisher(self, module: str) -> NDArray[np.float32]:
        """Raises InputError where the file holds what no calibration writes."""
        values = self._read(f"{module}.fisher")
        if (values < 0).any():
            raise self._damaged(f"{module}.fisher")
        return values

    def load(self, site: str, parts: Parts | None = None) -> SiteStatistics:
        """Raises InputError where the file holds what no calibration writes."""
        arrays = {part: self._read(f"{site}.{part}") for part in PARTS}
        if (arrays["hessian"].diagonal() < 0).any():
            raise self._damaged(f"{site}.hessian")
        return site_statistics(site, self.sites[site].linears, self.content["sites"][site], arrays)

    def load_memory(self, site: str) -> int:
        return sum(self.checkpoint.tensors[f"{site}.{part}"].spec.nbytes for part in PARTS)

    def ranges(self, modules: Collection[str]) -> Ranges:
        """Of every site, from its absmax alone. Raises InputError as `load` does."""
        for site in self.sites:
            yield site, self._read(f"{site}.absmax")

    def only(self, site: str) -> CalibrationFile:
        own = super().only(site)
        names = [f"{site}.{part}" for part in PARTS if site in self.sites]
        names += [f"{module}.fisher" for module in own.fisher]
        return replace(
            own,
            checkpoint=replace(self.checkpoint.part(names), metadata={}),
            content={**self.content, "sites": only_entry(self.content["sites"], site)},
        )

    def digest(self, site: str, parts: Parts | None = None) -> str:
        digest = Digest(json.dumps(self.content["sites"][site], sort_keys=True))
        for part in PARTS:
            digest.update(self.checkpoint.read_bytes(f"{site}.{part}"))
        return digest.hexdigest()


def open_calibration(path: Path) -> CalibrationFile:
    """Open a statistics file that this tool wrote.

    Raises:
        InputError: another kind of file, or one that contradicts itself.
    """
    checkpoint = open_checkpoint(path)
    try:
        content = json.loads(checkpoint.metadata["ptq"])
        if content["kind"] != "calibration" or content["version"] != VERSION:
            raise InputError(
                f"{path}: a {content['kind']} file of version {content['version']}, not statistics"
                f" of version {VERSION}",
                hint="calibrate again",
            )
        sites = {
            site: _site_info(path, checkpoint, site, entry)
            for site, entry in sorted(content["sites"].items())
        }
        model = str(content["model"])
        heldout = int(content["heldout_every"]), int(content["heldout_limit"])
        weak = tuple(content.get("weak", ()))
        if not all(isinstance(reason, str) for reason in weak):
            raise ValueError
        fisher = {
            module: _fisher_info(checkpoint, module, n)
            for module, n in content.get("fisher", {}).items()
        }
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        raise InputError(
            f"{path}: not a statistics file", hint="make one with ptq calibrate"
        ) from None
    return CalibrationFile(
        checkpoint,
        content,
        model,
        name=str(path),
        sites=sites,
        heldout=heldout,
        files=(checkpoint.weights, *checkpoint.files),
        warnings=tuple(f"{path}: {reason}" for reason in weak),
        weak=weak,
        fisher=fisher,
    )


def _fisher_info(checkpoint: Checkpoint, module: str, n_samples: int) -> FisherInfo:
    spec = checkpoint.tensors[f"{module}.fisher"].spec
    if spec.dtype != "F32" or int(n_samples) < 1:
        raise ValueError
    return FisherInfo(module, spec.shape, n_samples)


def _site_info(path: Path, checkpoint: Checkpoint, site: str, entry: Any) -> SiteInfo:
    specs = {}
    for part in PARTS:
        stored = checkpoint.tensors.get(f"{site}.{part}")
        if stored is None:
            raise InputError(f"{path}: tensor '{site}.{part}' is missing", hint="calibrate again")
        specs[part] = stored.spec
    n = specs["absmax"].shape[0]
    wanted = {"hessian": (n, n), "absmax": (n,), "absmean": (n,)}
    good = (
        all((specs[part].dtype, specs[part].shape) == ("F32", wanted[part]) for part in wanted)
        and (specs["histogram"].dtype, len(specs["histogram"].shape)) == ("I64", 1)
        and specs["histogram"].shape[0] > 0
        and is_float(specs["heldout"])
        and specs["heldout"].shape[1:] == (n,)
        and min(entry["n_tokens"], entry["n_seen"] - entry["n_tokens"] + 1) >= 1
        and type(entry["histogram_start"]) is int
        and all(isfinite(entry[key]) for key in ("n_seen", "min", "max", "mean", "std"))
        and isinstance(entry.get("own_tokens", 0), int)
        and isinstance(entry["linears"], list)
        and all(isinstance(linear, str) for linear in entry["linears"])
    )
    if not good:
        raise InputError(f"{path}: site {site!r} is damaged", hint="calibrate again")
    return SiteInfo(
        site, tuple(entry["linears"]), n, int(entry["n_tokens"]), entry.get("own_tokens")
    )


def site_tensors(s: SiteStatistics) -> list[Bytes]:
    """The tensors of one site, as the file holds them."""
    assert s.distribution is not None  # it was asked for
    arrays = {part: getattr(s, part) for part in PARTS if part != "histogram"}
    arrays["histogram"] = s.distribution.histogram
    return [as_bytes(f"{s.site}.{part}", arrays[part]) for part in PARTS]


def site_entry(s: SiteStatistics) -> dict[str, Any]:
    """What the metadata says of one site."""
    assert s.distribution is not None  # it was asked for
    weak, values = weak_inputs(s), s.distribution
    shared = {} if s.own_tokens is None else {"own_tokens": s.own_tokens}
    return (
        ({"weak": weak} if weak else {})
        | shared
        | {
            "linears": list(s.linears),
            "n_tokens": s.n_tokens,
            "n_seen": s.n_seen,
            "min": values.minimum,
            "max": values.maximum,
            "mean": values.mean,
            "std": values.std,
            "p99": percentile(values, 0.99),
            "static_scale": static_scale(values),
            "histogram_start": values.start,
        }
    )


def site_statistics(
    site: str, linears: tuple[str, ...], entry: Mapping[str, Any], parts: Mapping[str, Any]
) -> SiteStatistics:
    """The statistics behind `site_entry` and the arrays of `site_tensors`, by their last names."""
    arrays = dict(parts)
    distribution = Distribution(
        minimum=float(entry["min"]),
        maximum=float(entry["max"]),
        mean=float(entry["mean"]),
        std=float(entry["std"]),
        histogram=arrays.pop("histogram"),
        start=int(entry["histogram_start"]),
    )
    return SiteStatistics(
        site=site,
        linears=linears,
        n_tokens=int(entry["n_tokens"]),
        n_seen=int(entry["n_seen"]),
        own_tokens=entry.get("own_tokens"),
        distribution=distribution,
        **arrays,
    )


def file_content(
    model: str,
    heldout: tuple[int, int],
    sites: Mapping[str, Any],
    fisher: Mapping[str, FisherInfo],
    weak: Sequence[str] = (),
) -> dict[str, Any]:
    """The metadata of a statistics file. weak: why errors measured on its inputs say little"""
    found = without_natural_repeats({site: entry.get("weak", {}) for site, entry in sites.items()})
    entries = {site: {**entry, "weak": found[site]} for site, entry in sites.items()}
    for entry in entries.values():
        if not entry["weak"]:
            del entry["weak"]
    content: dict[str, Any] = {
        "kind": "calibration",
        "version": VERSION,
        "model": model,
        "heldout_every": heldout[0],
        "heldout_limit": heldout[1],
        "sites": entries,
    }
    if fisher:
        content["fisher"] = {module: info.n_samples for module, info in fisher.items()}
    if weak:
        content["weak"] = list(weak)
    return content


def beside(checkpoint: Checkpoint) -> tuple[Path | None, Path | None]:
    """The statistics file and the `activations/` folder beside a model, where there are any."""
    names = listing(checkpoint.folder)
    statistics = f"{checkpoint.stem}.calibration{SUFFIX}"
    return (
        checkpoint.folder / statistics if statistics in names else None,
        checkpoint.folder / "activations" if "activations" in names else None,
    )
