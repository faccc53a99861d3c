"""What a family says of its forward, and what the pieces of a block are made from.

Most of a block is alike in all families: that is built from a `Forward`'s fields (usual.py). What
is not, a family builds itself: `mixer` and `feed_forward` take a `BlockReader` and give a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeGuard

from ptq_cli.errors import InputError
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.layers import Linear, Norm
from ptq_cli.models.names import Names

Config = Mapping[str, Any]
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # of 32 bits


def never(config: Config, index: int) -> bool:
    return False


def always(config: Config, index: int) -> bool:
    return True


@dataclass(frozen=True)
class Forward:
    """What a block computes, and how config.json says it.

    gated: the MLP is `down(f(gate) · up)`, else `down(f(up))`
    centred: norms are LayerNorms, else RMSNorms; norm_bias: these have biases
    norm_whole: the norms of q and k are over all heads as one, not over each
    per_head: q, k and v in one linear stand there by key heads, as of `MultiHead`
    turns: whether a block's queries and keys are turned by their positions
    partly: of a head only the first channels are, where `partial_rotary_factor` says so; other
        families leave that key unread, as transformers does
    interleaved: neighbouring channels turn together, not those of a head's two halves
    parallel: whether attention and MLP both see the residual before the block
    embedding_scaled: embeddings are multiplied by √hidden_size
    position_offset: added to learned positions; with `position_counts` these count tokens instead
        of columns
    biases: "qkv", "output", "mlp", "experts" and "router" → always (true), never or a key of
        config.json
    slides: where config.json sets `sliding_window`, whether a block's tokens see only so many, from
        config.json and the block's number; by_type: config.json's `layer_types` goes before that
    mixer, feed_forward: the branches of a block that are not the usual ones
    norms: role → name, from config.json, where it is not `Names.norms`
    """

    gated: bool = True
    centred: bool = False
    norm_bias: bool = True
    norm_whole: bool = False
    per_head: bool = False
    turns: Callable[[Config, int], bool] = always
    partly: bool = False
    interleaved: bool = False
    parallel: Callable[[Config], bool] = lambda config: False
    embedding_scaled: bool = False
    position_offset: int = 0
    position_counts: bool = False
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    slides: Callable[[Config, int], bool] = never
    by_type: bool = False
    mixer: Callable[[BlockReader], Branch] | None = None
    feed_forward: Callable[[BlockReader], Branch] | None = None
    norms: Callable[[Config], Mapping[str, str]] | None = None


@dataclass(frozen=True)
class BlockReader:
    """A block of a model that is being read.

    settings: config.json's in our words (Family.settings), with the sizes that follow from others
    base: before the names of its modules, "model.layers.3."
    n_tensors: in the checkpoint, or None without one
    transposed, plus_one, keys: as in `Family`
    """

    settings: Config
    forward: Forward
    names: Names
    transposed: bool
    plus_one: bool
    keys: Mapping[str, str]
    base: str
    index: int
    n_tensors: int | None = None

    def linear(self, part: str, name: str) -> Linear:
        """The linear of that inner name. part: what says whether it has a bias (Forward.biases)"""
        bias = self.forward.biases.get(part, False)
        has = bool(self.settings.get(bias)) if isinstance(bias, str) else bias
        return Linear(self.base + name, has, self.transposed)

    def norm(self, name: str) -> Norm:
        """The norm of that inner name."""
        full, offset = self.base + name, self.plus_one
        return make_norm(self.settings, self.forward, full, self.keys, plus_one=offset)

    def number(self, key: str) -> int:
        """A setting that is a size or a count.

        Raises:
            InputError: it is missing, or is no positive whole number.
        """
        return number(self.settings, key, self.keys)

    def count(self, key: str) -> int:
        """How many there are of what has tensors of its own.

        Raises:
            InputError: as of `number`, and for more than there are tensors.
        """
        return count(self.settings, key, self.keys, self.n_tensors)

    def positive(self, key: str) -> float:
        """A setting that is a positive real number.

        Raises:
            InputError: it is something else.
        """
        return positive(self.settings, key, self.keys)

    def entry(self, key: str) -> Any:
        """The block's own in a setting that is a list with one for each.

        Raises:
            InputError: it is no list, or one that is too short.
        """
        return entry(self.settings, key, self.index)


def make_norm(
    settings: Config, forward: Forward, name: str, keys: Mapping[str, str], *, plus_one: bool
) -> Norm:
    """The norm of that full name. keys: our word → the family's key"""
    return Norm(
        name=name,
        eps=real(settings, "norm_eps", keys, least=0),
        centred=forward.centred,
        offset=1.0 if plus_one else 0.0,
        affine=bool(settings.get("norm_affine", True)),
        bias=forward.centred and forward.norm_bias,
    )


def number(settings: Config, key: str, keys: Mapping[str, str], least: int = 1) -> int:
    """A setting that is a size or a count. keys: our word → the family's key

    Raises:
        InputError: it is missing, or is no whole number from `least` on that 32 bits hold.
    """
    value = settings.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_INT:
        return value
    what = "a positive whole number" if least == 1 else f"a whole number from {least} on"
    bound = f" of at most {LARGEST_INT}" if isinstance(value, int) and value > least else ""
    raise InputError(f"config.json's {keys.get(key, key)} is {value!r}; {what}{bound} is needed")


def count(settings: Config, key: str, keys: Mapping[str, str], n_tensors: int | None) -> int:
    """How many there are of what has tensors of its own. n_tensors: in the checkpoint, or None

    Raises:
        InputError: as of `number`, and for more than there are tensors.
    """
    value = number(settings, key, keys)
    if n_tensors is not None and value > n_tensors:
        raise InputError(
            f"config.json's {keys.get(key, key)} is {value}, but there are only {n_tensors}"
            " tensors",
            hint="is this config.json the model's own?",
        )
    return value


def _is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def real(
    settings: Config, key: str, keys: Mapping[str, str], least: float = -LARGEST_FLOAT
) -> float:
    """A setting that is a real number. keys: our word → the family's key

    Raises:
        InputError: it is missing, less than `least`, or no number that float32 holds.
    """
    value = settings.get(key)
    if _is_real(value) and least <= value <= LARGEST_FLOAT:
        return float(value)
    what = "a number" if least < 0 else f"a number from {least} on"
    raise InputError(
        f"config.json's {keys.get(key, key)} is {value!r}; {what} that float32 holds is needed"
    )


def positive(settings: Config, key: str, keys: Mapping[str, str]) -> float:
    """A setting that is a positive real number. keys: our word → the family's key

    Raises:
        InputError: it is missing, not positive, or no number that float32 holds.
    """
    value = settings.get(key)
    if not _is_real(value) or not value > 0:
        raise InputError(
            f"config.json's {keys.get(key, key)} is {value!r}; a positive number is needed"
        )
    return real(settings, key, keys)


def numbers(settings: Config, key: str, keys: Mapping[str, str]) -> list[int]:
    """A setting that lists numbers of blocks; none where config.json has none.

    Raises:
        InputError: it is no list of whole numbers.
    """
    value = settings.get(key)
    found = [] if value is None else value
    if not isinstance(found, list) or not all(type(entry) is int for entry in found):
        raise InputError(
            f"config.json's {keys.get(key, key)} is {value!r}; a list of whole numbers is needed"
        )
    return found


def entry(settings: Config, key: str, index: int) -> Any:
    """The entry of block `index` in a setting that has one for each block.

    Raises:
        InputError: it is no list, or one with fewer entries than blocks.
    """
    entries, blocks = settings[key], settings["num_hidden_layers"]
    if not isinstance(entries, list):
        raise InputError(f"config.json's {key} is {entries!r}; a list of {blocks} is needed")
    if index >= len(entries):
        raise InputError(f"config.json's {key} has {len(entries)} entries for {blocks} blocks")
    return entries[index]
