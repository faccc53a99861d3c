"""A site: linears that share one input, and what feeds it and can take the factors of smoothing.

Dividing a site's inputs by s and multiplying the columns of all its linears by s changes nothing
but where the difficulty lies. The division has to happen before the site, without cost:

- in a norm that feeds nothing else: gain and bias are divided by s (`Norm`);
- in a linear whose outputs reach the site through something that commutes with a positive scale per
  channel (`Preceding`): its rows and bias are divided by s.

v_proj → o_proj. Head h of an attention gives `A_h · V_kv(h)`, a mixture over tokens of the rows of
its value head, so channel d of the head, input (h, d) of o_proj, is linear in output (kv(h), d) of
v_proj: that row may be divided by s. With as many value heads as heads each row reaches one input.
With grouped heads the inputs (h, d) of all heads h that read one value head are fed by one row:
their factors have to be equal ("tied"), and then the fold is exact too. `Site.ties` numbers the
inputs that share a row.

up_proj → down_proj. The input is `act(gate) · up`, linear in each output of up_proj. Without a gate
only an activation with `act(z / s) = act(z) / s` will do: relu.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from ptq_cli.core.tensors import TensorSpec
from ptq_cli.errors import InputError

Layout = Literal["all", "second half", "heads", "q k v", "q k v per head", "k v per head"]
Certainty = Literal["known", "sure", "likely", "guess"]
Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class Rows:
    """Which output of a linear feeds each input of a site: input j of head `h = j // width` is fed
    by output `offset + (h // repeat) · stride + j % width`."""

    offset: int
    width: int
    stride: int
    repeat: int = 1

    def index(self, in_features: int) -> NDArray[np.int64]:
        """Output that feeds each input, int64 [in_features]."""
        head, channel = np.divmod(np.arange(in_features), max(1, self.width))
        return self.offset + (head // self.repeat) * self.stride + channel


@dataclass(frozen=True)
class SiteLinear:
    """A linear of a site.

    transposed: stored [in_features, out_features] (GPT-2's Conv1D)
    expert: the expert that it is in, which sees some of the site's tokens only
    """

    module: str
    tensor: str
    transposed: bool = False
    expert: str = ""


@dataclass(frozen=True)
class Norm:
    """An RMSNorm or LayerNorm. plus_one: the gain is stored less one, it is 1 + weight (Gemma)."""

    weight: str
    bias: str | None = None
    plus_one: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Preceding:
    """A linear whose outputs `rows` feed the site through something linear per channel."""

    weight: str
    bias: str | None
    rows: Rows
    transposed: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class SitePattern:
    """A site by the names of its modules: linears that share one input, fed by `norm`, or by the
    linear `after` whose outputs are laid out as `layout` (see `rows_of`), or by nothing known.

    plus_one: the norm's gain is stored less one
    heads: attention heads, where the layout has heads; 0: not known
    transposed: linears are stored [in_features, out_features]
    """

    linears: tuple[str, ...] = ()
    norm: str = ""
    plus_one: bool = False
    after: str = ""
    layout: Layout = "all"
    heads: int = field(default=0, metadata={"min": 1})
    transposed: bool = False

    def named(self, full: Callable[[str], str]) -> Self:
        """The pattern with the full names of its modules."""
        linears = tuple(full(linear) for linear in self.linears)
        norm, after = self.norm and full(self.norm), self.after and full(self.after)
        return replace(self, linears=linears, norm=norm, after=after)

    def missing(self, specs: Specs) -> tuple[str, ...]:
        """Weights that are not in the checkpoint."""
        modules = (*self.linears, self.norm, self.after)
        return tuple(f"{m}.weight" for m in modules if m and f"{m}.weight" not in specs)

    def shape(self, linear: str, specs: Specs) -> tuple[int, ...]:
        """(out_features, in_features) of a linear."""
        shape = specs[f"{linear}.weight"].shape
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class Site:
    """Linears that share one input.

    name: the first linear's module
    feeder: what takes the factors; None where nothing can, and then `reason` says why
    missing: tensors that the family needs here and the checkpoint lacks
    certainty: that the linears share an input: "known" from a family or a recipe, else derived
    """

    name: str
    linears: tuple[SiteLinear, ...]
    in_features: int
    feeder: Norm | Preceding | None
    reason: str | None = None
    missing: tuple[str, ...] = ()
    certainty: Certainty = "known"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Every tensor a fold changes: the feeder's, then the linears'."""
        fed_by = () if self.feeder is None else self.feeder.tensors
        return (*fed_by, *(linear.tensor for linear in self.linears))

    @property
    def ties(self) -> NDArray[np.int64] | None:
        """Number of the row that feeds each input, int64 [in_features], where inputs share rows:
        they have to share a factor too. None where every input is free."""
        if isinstance(self.feeder, Preceding) and self.feeder.rows.repeat > 1:
            return self.feeder.rows.index(self.in_features)
        return None


def require_whole(sites: tuple[Site, ...]) -> None:
    """Refuse sites that lack tensors: folding into what is there would change the model.

    Raises:
        InputError: the first site with something missing.
    """
    for site in sites:
        if site.missing:
            hint = "give the whole model, not one of its shards"
            raise InputError(f"site {site.name}: {site.reason}", hint=hint)


def make_site(
    pattern: SitePattern,
    specs: Specs,
    obstacle: str | None = None,
    experts: Collection[str] = (),
) -> Site:
    """The site of a pattern of full names; without a feeder where its tensors do not fit.

    obstacle: why nothing takes factors, where that is known beforehand
    experts: modules that see the tokens routed to them only
    """
    linears = tuple(
        SiteLinear(module, f"{module}.weight", pattern.transposed, inside if among else "")
        for module in pattern.linears
        for inside in (module.rpartition(".")[0],)
        for among in (inside in experts,)
    )
    present = [linear.module for linear in linears if linear.tensor in specs]
    width = pattern.shape(present[0], specs)[-1] if present else 0
    feeder = misfit(pattern, specs) or obstacle or _feeder(pattern, specs, width)
    if isinstance(feeder, str):
        return Site(linears[0].module, linears, width, None, feeder, pattern.missing(specs))
    return Site(linears[0].module, linears, width, feeder)


def misfit(pattern: SitePattern, specs: Specs) -> str | None:
    """Why the tensors of a pattern of full names cannot make a site; None where they can."""
    if missing := pattern.missing(specs):
        return f"{', '.join(missing)} not in the checkpoint"
    width = pattern.shape(pattern.linears[0], specs)[-1]
    for linear in (*pattern.linears, pattern.after) if pattern.after else pattern.linears:
        shape = pattern.shape(linear, specs)
        if len(shape) != 2:
            return f"{linear}.weight of shape {shape} is not a linear's"
        if linear != pattern.after and shape[1] != width:
            return f"{linear} takes {shape[1]} inputs, not {width}"
    if pattern.norm and specs[f"{pattern.norm}.weight"].shape != (width,):
        gains = specs[f"{pattern.norm}.weight"].shape
        return f"{pattern.norm} has {gains} gains for {width} inputs"
    return None


def _feeder(pattern: SitePattern, specs: Specs, width: int) -> Norm | Preceding | str:
    """What takes the factors of `width` inputs, or why nothing does."""
    source = pattern.norm or pattern.after
    bias = f"{source}.bias" if f"{source}.bias" in specs else None
    if pattern.norm:
        return Norm(f"{source}.weight", bias, pattern.plus_one)
    outputs = pattern.shape(source, specs)[0]
    rows = rows_of(pattern.layout, outputs, width, pattern.heads or None)
    if isinstance(rows, str):
        return rows
    return Preceding(f"{source}.weight", bias, rows, pattern.transposed)


def rows_of(layout: Layout, outputs: int, in_features: int, heads: int | None) -> Rows | str:
    """How `outputs` of a linear feed a site, or why that cannot be told.

    layout: "all" output j feeds input j; "second half" of [gate | up]; "heads" value heads, each
        read by as many heads as there are more of them; "q k v" the last part of [q | k | v];
        "q k v per head" [value head, its queries + 2, head_dim] (BLOOM, Falcon); "k v per head"
        [head, key size + value size], the sizes differ (DeepSeek)
    heads: attention heads; needed where value heads are fewer, and per head
    """
    mismatch = f"{outputs} outputs of the linear before it do not map onto {in_features} inputs"
    times = {"all": 1, "second half": 2}  # outputs for each input
    if layout in times and outputs != times[layout] * in_features:
        return mismatch
    if layout == "all":
        return Rows(0, 1, 1)
    if layout == "second half":
        return Rows(in_features, in_features, in_features)
    values, odd, offset = outputs, 0, 0
    if layout in ("q k v", "q k v per head"):
        values, odd = divmod(outputs - in_features, 2)
        offset = in_features + values
    if values <= 0 or odd:
        return mismatch
    if values == in_features and layout in ("heads", "q k v"):
        return Rows(offset, in_features, in_features)
    if heads is None:
        return "the number of attention heads is not known without config.json"
    if heads < 1 or in_features % heads:
        return f"{heads} attention heads do not divide {in_features} inputs"
    width = in_features // heads
    if layout == "k v per head":
        both, rest = divmod(outputs, heads)
        return mismatch if rest or both < width else Rows(both - width, width, both)
    if values % width or heads % (values // width):
        return mismatch
    repeat = in_features // values
    if layout == "q k v per head":
        return Rows((repeat + 1) * width, width, (repeat + 2) * width, repeat)
    return Rows(offset, width, width, repeat)
