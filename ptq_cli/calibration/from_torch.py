"""Statistics straight from a torch model, for architectures without a forward here.

    with ptq_cli.capture(model, "model/"):
        for batch in batches:
            model(batch)
    # model/model.calibration.safetensors is there; ptq gptq model/ finds it

Every linear's inputs go into Hessians as they are computed; nothing of the size of the activations
touches the disk. torch is the caller's; it is imported late. Linears whose inputs are the same in
every call (q, k and v) are summed once.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq_cli.calibration.from_file import file_content, site_entry, site_tensors
from ptq_cli.calibration.shared_inputs import SharedInputs
from ptq_cli.calibration.sites import model_sites, transposed_tensors
from ptq_cli.calibration.torch_experts import routed_inputs
from ptq_cli.calibration.torch_modules import Found, FusedExperts, find_modules
from ptq_cli.calibration.torch_sharing import Sharing
from ptq_cli.core.names import fold_names
from ptq_cli.errors import InputError
from ptq_cli.models.derived_sites import derive_sites
from ptq_cli.models.linears import group_modules, left_alone, module_tree
from ptq_cli.models.recipe_text import recipe_text
from ptq_cli.models.sites import SitePattern
from ptq_cli.numerics.statistics import HELDOUT_EVERY, HELDOUT_LIMIT
from ptq_cli.storage.checkpoint import Checkpoint
from ptq_cli.storage.files import replacing, write_whole
from ptq_cli.storage.output import check_place
from ptq_cli.storage.sources import open_float
from ptq_cli.storage.tensors import own_metadata, serialize
from ptq_cli.storage.weights import CALIBRATION_SUFFIX


class Capture:
    """What the hooks fill. `mask` may be set before a call: [n, length], 0 at padding.

    widths: in_features of every linear
    groups: linears that may share their inputs
    sharing: is told which do, whatever their names
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        groups: Iterable[tuple[str, ...]],
        heldout: tuple[int, int],
        sharing: Sharing | None = None,
    ) -> None:
        self.mask: Any = None
        self.unmasked: dict[str, None] = {}  # linears that saw other tokens than the mask's
        self._widths, self._heldout, self._sharing = widths, heldout, sharing
        self.groups: list[tuple[str, ...]] = []  # of linears, as they are written
        self._of_linear: dict[str, SharedInputs] = {}
        for group in groups:
            self._of_linear |= dict.fromkeys(group, SharedInputs(group, heldout))
        self._called: dict[SharedInputs, None] = {}  # in this order
        self._calls: Counter[str] = Counter()
        self._error: InputError | None = None

    def see(self, linear: str, inputs: Any) -> None:
        """Take in a linear's inputs, a tensor [..., in_features]."""
        self._calls[linear] += 1
        if self._sharing is not None:
            self._sharing.see(linear, inputs)
        self._take(linear, inputs, self._shown(linear, inputs.shape[:-1].numel()))

    def see_experts(self, experts: FusedExperts, arguments: Sequence[Any]) -> None:
        """Take in what each expert sees in one call of the module that holds them."""
        linears = [linear for group in experts.groups for linear in group]
        self._calls.update(linears)
        mask = partial(self._shown, linears[0])
        for expert, before, behind in routed_inputs(experts.module, arguments, mask):
            for linear in experts.before.get(expert, ()):
                self._take(linear, before)
            for linear in experts.behind.get(expert, ()):
                self._take(linear, behind)

    def _shown(self, linear: str, tokens: int) -> NDArray[np.bool_] | None:
        """Which tokens are no padding, bool [tokens]; None: no mask says it."""
        if self.mask is None:
            return None
        mask = self.mask.cpu() if hasattr(self.mask, "cpu") else self.mask
        shown = np.asarray(mask).astype(np.bool_).reshape(-1)
        if len(shown) == tokens:
            return shown
        self.unmasked[linear] = None
        return None

    def _take(self, linear: str, inputs: Any, shown: NDArray[np.bool_] | None = None) -> None:
        def rows() -> NDArray[np.float32]:
            flat = inputs.detach().reshape(-1, inputs.shape[-1])
            values: NDArray[np.float32] = flat.float().cpu().numpy()
            values = values.copy() if shown is None else values[shown]  # the model may write to its
            self._check(linear, values)
            return values

        shared = self._of_linear[linear]
        self._called.setdefault(shared)
        shared.take(linear, rows, _identity(inputs), inputs)

    def _check(self, linear: str, rows: NDArray[np.float32]) -> None:
        """Raise an error, now and at the end, where inputs are of no use."""
        width, where = self._widths[linear], f"{linear}, call {self._calls[linear]}"
        if rows.shape[1] != width:
            self._error = InputError(
                f"{where}: inputs have {rows.shape[1]} features, its weight in the checkpoint"
                f" {width}",
                hint="capture the model that the checkpoint holds",
            )
        elif not np.isfinite(rows.sum(dtype=np.float64)):
            token, channel = np.argwhere(~np.isfinite(rows))[0]
            self._error = InputError(
                f"{where}: inputs hold {rows[token, channel]} at token {token}, channel {channel}",
                hint="run the model in a wider dtype, or set the mask where there is padding",
            )
        if self._error is not None:
            raise self._error

    def write(
        self, path: Path, checkpoint: Checkpoint, names: Mapping[str, Sequence[str]]
    ) -> list[str]:
        """Write the statistics file; the linears that have none.

        names: all names of the modules that were hooked, by the one that they were hooked by

        Raises:
            InputError: no linear was called, or one with inputs that are of no use.
        """
        if self._error is not None:
            raise self._error
        tensors, entries = [], {}
        left = dict.fromkeys(self._of_linear)
        for shared in self._called:
            for statistics in shared.results():
                tensors += site_tensors(statistics)
                linears = [name for linear in statistics.linears for name in names[linear]]
                entries[statistics.site] = site_entry(statistics) | {"linears": linears}
                self.groups.append(statistics.linears)
                for linear in statistics.linears:
                    del left[linear]
        if not entries:
            raise InputError("no linear of the model was called", hint="run it inside the capture")
        content = file_content(checkpoint.fingerprint, self._heldout, entries, {})
        with replacing(path) as partly:
            serialize(partly, tensors, own_metadata(content))
        return [name for linear in left for name in names[linear]]


def _identity(tensor: Any) -> Hashable | None:
    """What tells that two tensors are the same, while one of them is kept; None: nothing does."""
    if tensor.is_inference():  # these do not count how often they were written to
        return None
    place = tensor.data_ptr(), tensor.device, tensor.dtype, tensor._version
    return (*place, tuple(tensor.shape), tensor.stride())


def _hook(capture: Capture, found: Found) -> list[Any]:
    """Hook all modules that were found; the handles."""

    def linear(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, named: capture.see(name, (*args, *named.values())[0])

    def experts(own: FusedExperts) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, named: capture.see_experts(own, (*args, *named.values()))

    hooks = [(module, linear(name)) for name, module in found.modules.items()]
    hooks += [(own.module, experts(own)) for own in found.experts.values()]
    return [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=4)


def _end_warnings(capture: Capture, bare: Sequence[str]) -> Iterator[str]:
    if bare:
        yield (
            f"no token reached {len(bare)} linears, which have no statistics: {fold_names(bare)};"
            " ptq gptq rounds them to nearest with --fallback rtn"
        )
    if capture.unmasked:
        yield (
            f"the mask was of another size than the inputs of {len(capture.unmasked)} modules,"
            f" whose padding was counted: {fold_names(capture.unmasked)}"
        )


@contextmanager
def capture(
    model: Any,
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    sites: str | Path | None = None,
    named: Callable[[str], str] = lambda name: name,
    heldout_every: int = HELDOUT_EVERY,
    heldout_limit: int = HELDOUT_LIMIT,
) -> Iterator[Capture]:
    """Hook the linears of a torch model; at the end write `<model>.calibration.safetensors`.

    Linears that have no module in the model, or that nothing called, are warned of. Where an
    exception leaves the block nothing is written.

    model: a torch.nn.Module
    checkpoint: the weights that ptq will quantize; output: default beside them
    sites: where to write a recipe with the sites that were seen: [[sites]]
    named: from a module's name in `model` to the one in the checkpoint, where they differ; names
        that transformers gives to modules of the checkpoint's family are known

    Raises:
        InputError: torch is missing; no module has the name of a linear of the checkpoint; none was
            called; a linear's inputs hold NaN or inf, or are of another width than its weight.
    """
    try:
        torch = import_module("torch")
    except ImportError:
        raise InputError("ptq_cli.capture needs torch", hint="pip install torch") from None
    opened = open_float(Path(checkpoint))
    target = opened.folder / (opened.stem + CALIBRATION_SUFFIX) if output is None else Path(output)
    for place in (target, *(() if sites is None else (Path(sites),))):
        check_place(place)
    widths = _widths(opened)
    named_modules = model.named_modules(remove_duplicate=False)
    modules = {named(name): module for name, module in named_modules}
    found = find_modules(widths, modules, module_tree(opened.config))
    if not found.names:
        raise InputError(
            f"{opened.path}: no module of the model has the name of a linear there",
            hint=f"named= maps names; there is {next(iter(widths), 'none')!r}, for instance",
        )
    shared = [site for site in model_sites(opened).sites if len(site.linears) > 1]
    groups = group_modules(found.modules, shared)  # what is alone there may share by its name
    groups += [group for own in found.experts.values() for group in own.groups]
    sharing = None if sites is None else Sharing()
    capture = Capture(widths, groups, (heldout_every, heldout_limit), sharing)
    _warn(found.warnings())
    handles = _hook(capture, found)
    try:
        with torch.no_grad():
            yield capture
    finally:
        for handle in handles:
            handle.remove()
    bare = capture.write(target, opened, found.names)
    if sites is not None and sharing is not None:
        write_whole(Path(sites), _recipe(sharing, capture.groups, opened, found.names))
    _warn(_end_warnings(capture, bare))


def _recipe(
    sharing: Sharing,
    groups: Sequence[tuple[str, ...]],
    checkpoint: Checkpoint,
    names: Mapping[str, Sequence[str]],
) -> str:
    """The sites that were seen, as `[[sites]]`, with what may feed those that are also derived."""
    turned = transposed_tensors(model_sites(checkpoint).sites)
    derived = {
        frozenset(site.pattern.linears): site.pattern
        for site in derive_sites(checkpoint.specs, checkpoint.config)
    }
    sites = []
    for group in sharing.merged(groups):
        linears = tuple(name for linear in group for name in names[linear])
        pattern = SitePattern(linears, transposed=f"{linears[0]}.weight" in turned)
        pattern = derived.get(frozenset(linears), pattern)
        sites.append((pattern, "seen: the same input in every call" if linears[1:] else "seen"))
    about = f"Sites of {checkpoint.path}, as a torch model showed them their inputs."
    return recipe_text(about, sites, checkpoint.specs)


def _widths(checkpoint: Checkpoint) -> dict[str, int]:
    """in_features of the linears that are quantized unless one says otherwise."""
    reasons = left_alone(checkpoint.specs, checkpoint.config)
    turned = transposed_tensors(model_sites(checkpoint).sites)
    return {
        name.removesuffix(".weight"): spec.shape[0 if name in turned else 1]
        for name, spec in checkpoint.specs.items()
        if name not in reasons
    }
