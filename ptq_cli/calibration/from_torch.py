"""Statistics straight from a torch model, for architectures without a forward here.

    with ptq_cli.capture(model, "model/"):
        for batch in batches:
            model(batch)
    # model/model.calibration.safetensors is there; ptq gptq model/ finds it

Every linear's inputs go into Hessians as they are computed; nothing of the size of the activations
touches the disk. torch is the caller's; it is imported late. Linears that share an input by their
names (q, k and v) are seen once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ptq_cli.calibration.from_file import file_content, site_entry, site_tensors
from ptq_cli.calibration.sites import model_sites
from ptq_cli.errors import InputError, stated_in
from ptq_cli.models.linears import group_modules, left_alone
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT, SiteAccumulator
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import replacing
from ptq_cli.storage.folder import open_float
from ptq_cli.storage.tensors import own_metadata, serialize
from ptq_cli.storage.weights import CALIBRATION_SUFFIX


class Capture:
    """What the hooks fill. `mask` may be set before a call: [n, length], 0 at padding."""

    def __init__(self, groups: Mapping[str, tuple[str, ...]], heldout: tuple[int, int]) -> None:
        self.groups, self.heldout = groups, heldout
        self.mask: Any = None
        self._sums: dict[str, SiteAccumulator] = {}

    def see(self, site: str, inputs: Any) -> None:
        """Take in a linear's inputs, a tensor [..., in_features]."""
        width = inputs.shape[-1]
        rows = inputs.detach().reshape(-1, width).float().cpu().numpy()
        if self.mask is not None:
            shown = np.asarray(self.mask).astype(np.bool_).reshape(-1)
            if len(shown) == len(rows):
                rows = rows[shown]
        if site not in self._sums:
            self._sums[site] = SiteAccumulator(width, *self.heldout)
        with stated_in(site):
            self._sums[site].update(rows)

    def write(self, path: Path, checkpoint: Checkpoint) -> None:
        """Write the statistics file. Raises InputError where no linear was called."""
        seen = [site for site, sums in self._sums.items() if sums.n_tokens]
        if not seen:
            raise InputError("no linear of the model was called", hint="run it inside the capture")
        tensors, entries = [], {}
        for site in seen:
            statistics = self._sums.pop(site).result(site, self.groups[site])
            tensors += site_tensors(statistics)
            entries[site] = site_entry(statistics)
        content = file_content(checkpoint.fingerprint, self.heldout, entries, {})
        with replacing(path) as partial:
            serialize(partial, tensors, own_metadata(content))


@contextmanager
def capture(
    model: Any,
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    named: Callable[[str], str] = lambda name: name,
    heldout_every: int = HELDOUT_EVERY,
    heldout_limit: int = HELDOUT_LIMIT,
) -> Iterator[Capture]:
    """Hook the linears of a torch model; at the end write `<model>.calibration.safetensors`.

    model: a torch.nn.Module
    checkpoint: the weights that ptq will quantize; output: default beside them
    named: from a module's name in `model` to the one in the checkpoint, where they differ

    Raises:
        InputError: torch is missing; no module has the name of a linear of the checkpoint.
    """
    try:
        torch = import_module("torch")
    except ImportError:
        raise InputError("ptq_cli.capture needs torch", hint="pip install torch") from None
    opened = open_float(Path(checkpoint))
    target = opened.folder / (opened.stem + CALIBRATION_SUFFIX) if output is None else Path(output)
    sites = model_sites(opened).sites
    reasons = left_alone(opened.specs, opened.config)
    linears = [name.removesuffix(".weight") for name in opened.specs if name not in reasons]
    groups = {group[0]: group for group in group_modules(linears, sites)}
    capture = Capture(groups, (heldout_every, heldout_limit))

    def hook(site: str) -> Callable[[Any, Any], None]:
        return lambda module, inputs: capture.see(site, inputs[0])

    modules = {named(name): module for name, module in model.named_modules()}
    handles = [
        modules[site].register_forward_pre_hook(hook(site)) for site in groups if site in modules
    ]
    if not handles:
        raise InputError(
            f"{opened.path}: no module of the model has the name of a linear there",
            hint=f"named= maps names; there is {next(iter(groups), 'none')!r}, for instance",
        )
    try:
        with torch.no_grad():
            yield capture
    finally:
        for handle in handles:
            handle.remove()
    capture.write(target, opened)
