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

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ptq_cli.errors import InputError

Layout = Literal["all", "second half", "heads", "q k v", "q k v per head"]


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
    """A linear of a site. transposed: stored [in_features, out_features] (GPT-2's Conv1D)."""

    module: str
    tensor: str
    transposed: bool = False


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
class Site:
    """Linears that share one input.

    name: the first linear's module
    feeder: what takes the factors; None where nothing can, and then `reason` says why
    missing: tensors that the family needs here and the checkpoint lacks
    """

    name: str
    linears: tuple[SiteLinear, ...]
    in_features: int
    feeder: Norm | Preceding | None
    reason: str | None = None
    missing: tuple[str, ...] = ()

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
            raise InputError(
                f"site {site.name}: {', '.join(site.missing)} not in the checkpoint",
                hint="give the whole model, not one of its shards",
            )


def rows_of(layout: Layout, outputs: int, in_features: int, heads: int | None) -> Rows | str:
    """How `outputs` of a linear feed a site, or why that cannot be told.

    layout: "all" output j feeds input j; "second half" of [gate | up]; "heads" value heads, each
        read by as many heads as there are more of them; "q k v" the last part of [q | k | v];
        "q k v per head" [head, 3, head_dim] (BLOOM)
    heads: attention heads; needed where value heads are fewer, and per head
    """
    if layout == "all":
        return Rows(0, 1, 1) if outputs == in_features else _mismatch(outputs, in_features)
    if layout == "second half":
        fits = outputs == 2 * in_features
        return (
            Rows(in_features, in_features, in_features) if fits else _mismatch(outputs, in_features)
        )
    if layout == "q k v per head":
        if outputs != 3 * in_features:
            return _mismatch(outputs, in_features)
        width = _head_dim(in_features, heads)
        return width if isinstance(width, str) else Rows(2 * width, width, 3 * width)
    offset = 0
    if layout == "q k v":
        if outputs <= in_features or (outputs - in_features) % 2:
            return _mismatch(outputs, in_features)
        outputs = (outputs - in_features) // 2
        offset = in_features + outputs
    if outputs == in_features:
        return Rows(offset, in_features, in_features)
    width = _head_dim(in_features, heads)
    if isinstance(width, str):
        return width
    if outputs == 0 or outputs % width or (in_features // width) % (outputs // width):
        return _mismatch(outputs, in_features)
    return Rows(offset, width, width, repeat=in_features // outputs)


def _head_dim(in_features: int, heads: int | None) -> int | str:
    if heads is None:
        return "the number of attention heads is not known without config.json"
    if heads < 1 or in_features % heads:
        return f"{heads} attention heads do not divide {in_features} inputs"
    return in_features // heads


def _mismatch(outputs: int, in_features: int) -> str:
    return f"{outputs} outputs of the linear before it do not map onto {in_features} inputs"
