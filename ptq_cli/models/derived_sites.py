"""The sites of a model whose family nobody knows, from config.json, names and shapes.

Inside a block linears are siblings where they are in one module. Those that take the block's width
share their input where their names, config.json's numbers of heads or the shapes of a gated MLP say
so; what gives the block's width back has an input of its own. How sure that is:

    sure    it is alone: no sibling takes as many inputs; or they are called as siblings of a known
            family that share their input, and no config.json says that the model is of another
    likely  they are called as siblings of a known family that share their input, or in the manner
            of q, k, v or gate, up, or shapes leave no other reading
    guess   anything else

Under another `model_type` names alone are not sure: DETR adds its positions to what q and k see,
not to what v sees.

Only what may feed a site is never sure (models/derived_feeders.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import add
from typing import Literal

from ptq_cli.models.derived_feeders import (
    behind_up,
    behind_values,
    is_gate,
    norm_before,
    only_norm,
)
from ptq_cli.models.families import text_type
from ptq_cli.models.family import Config, text_config
from ptq_cli.models.linears import is_cross_attention, known_row
from ptq_cli.models.sites import Certainty, SitePattern, Specs
from ptq_cli.models.unknown_blocks import Heads, UnknownBlock, keys_for, read_blocks, read_heads

_BEFORE = r"(?:(?:self_)?att(?:n|ention)?_|ffn_|mlp_)?(?:w_?|to_|c_|lin_|in_proj_)?"
_BEHIND = r"(?:_a)?(?:_proj\w*|_projection|_lin\w*|_layer)?"
_WORDS = {
    "attention": "q|k|v|qk|kv|qkv|qkvz|query|key|value|query_key_value|key_value|attn",
    "mlp": "gate|up|gate_up|up_gate|w1|w3|w13|wi|wi_0|wi_1|fc|fc1|fc_in|lin1|linear1|dense_h_to_4h",
    "output": "o|out|output|proj|dense|down|w2|fc2|fc_out|lin2|linear2|dense_4h_to_h",
}
_CALLED = {
    role: re.compile(f"{_BEFORE}(?:{words}){_BEHIND}", re.IGNORECASE)
    for role, words in _WORDS.items()
}
_PARALLEL = ("parallel_attn", "use_parallel_residual", "parallel_block", "parallel_residual")
_ACTIVATIONS = keys_for("activation", "hidden_act")

_KNOWN = "named as in known families"

Role = Literal["attention", "mlp", ""]


@dataclass(frozen=True)
class DerivedSite:
    """A site as it may be. pattern: with what may feed it; why: what speaks for it"""

    pattern: SitePattern
    certainty: Certainty
    why: str


@dataclass(frozen=True)
class _Group:
    """Linears of a block that share an input. takes: it is of the block's width; role: what they
    are the first linears of, where that is told"""

    linears: tuple[str, ...]
    certainty: Certainty
    why: str
    takes: bool = False
    role: Role = ""


def derive_sites(specs: Specs, config: Config) -> tuple[DerivedSite, ...]:
    """The sites of all blocks, each linear in one, in the order of the blocks.

    specs: the headers of the whole checkpoint; config: config.json, or {}
    """
    heads, settings = read_heads(config), text_config(config)
    kinds: dict[object, list[DerivedSite]] = {}  # blocks that are alike have sites that are alike
    found: list[DerivedSite] = []
    for block in read_blocks(specs, config):
        if block.kind not in kinds:
            groups = _side_by_side(_groups(block, heads), block, settings)
            kinds[block.kind] = [_site(group, groups, block, heads, settings) for group in groups]
        full = partial(add, block.path)
        found += (replace(x, pattern=x.pattern.named(full)) for x in kinds[block.kind])
    if text_type(config) is None:  # nothing says that the model is of another family
        found = [replace(x, certainty="sure") if x.why == _KNOWN else x for x in found]
    return tuple(found)


def _groups(block: UnknownBlock, heads: Heads) -> list[_Group]:
    modules: dict[str, list[str]] = defaultdict(list)
    for linear in block.linears:
        modules[linear.rpartition(".")[0]].append(linear)
    return [
        group
        for parent, linears in modules.items()
        for group in _siblings(parent, linears, block, heads)
    ]


def _siblings(
    parent: str, linears: Sequence[str], block: UnknownBlock, heads: Heads
) -> list[_Group]:
    """The groups of the linears of one module."""
    if any(is_cross_attention(block.path + linear) for linear in linears):
        why = "in an attention to another sequence q, k and v may see different inputs"
        return [_Group((linear,), "likely", why) for linear in linears]
    groups = _known_rows(linears, block)
    left = _without(linears, groups)
    groups += _called_alike([x for x in left if _takes_width(x, block)], groups)
    left = _without(linears, groups)
    if parent and not any(group.takes for group in groups):
        groups += _shaped_alike(left, block, heads)
    groups += [_alone(linear, linears, groups, block) for linear in _without(linears, groups)]
    mixed = [name for name in block.parameters if name.rpartition(".")[0] == parent]
    return _taken_apart(groups, mixed[0]) if mixed else groups


def _known_rows(linears: Sequence[str], block: UnknownBlock) -> list[_Group]:
    """Siblings that are called as those of known families."""
    rows: dict[tuple[tuple[str, ...], int], list[str]] = defaultdict(list)
    for linear in linears:
        rows[known_row(linear), block.linears[linear][1]].append(linear)
    return [
        _Group(
            tuple(sorted(own, key=lambda linear: row.index(_own(linear)))),
            "likely",
            _KNOWN,
            width == block.width,
            _role(own),
        )
        for (row, width), own in rows.items()
        if len(row) > 1 and len(own) > 1
    ]


def _role(linears: Sequence[str]) -> Role:
    roles: tuple[Role, ...] = ("attention", "mlp")
    return next((role for role in roles if any(_called(role, x) for x in linears)), "")


def _called(role: str, linear: str) -> bool:
    return _CALLED[role].fullmatch(_own(linear)) is not None


def _takes_width(linear: str, block: UnknownBlock) -> bool:
    """Whether it takes the block's width and does not seem to give it back."""
    outputs, inputs = block.linears[linear]
    return inputs == block.width and (outputs != inputs or _role([linear]) != "")


def _without(linears: Sequence[str], groups: Sequence[_Group]) -> list[str]:
    taken = {linear for group in groups for linear in group.linears}
    return [linear for linear in linears if linear not in taken]


def _called_alike(linears: Sequence[str], known: Sequence[_Group]) -> list[_Group]:
    """Siblings that are called as what an attention begins with, or an MLP."""
    roles: dict[Role, list[str]] = defaultdict(list)
    for linear in linears:
        roles[_role([linear])].append(linear)
    attends = "attention" in roles or any(group.role == "attention" for group in known)
    if attends and len(roles["mlp"]) == 1 and is_gate(roles["mlp"][0]):
        del roles["mlp"]  # its own
    return [
        _Group(tuple(own), "likely", "by what they are called", True, role)
        for role, own in roles.items()
        if role and own and not any(group.role == role for group in known)
    ]


def _shaped_alike(linears: Sequence[str], block: UnknownBlock, heads: Heads) -> list[_Group]:
    """Siblings of unknown names that can only be q, k and v, or gate and up."""
    shapes = {linear: block.linears[linear] for linear in linears}
    first = [x for x in linears if shapes[x][1] == block.width != shapes[x][0]]
    behind = [shapes[x] for x in linears if x not in first]
    equal = len({shapes[x] for x in first}) == 1
    if len(first) == 2 and equal and behind == [shapes[first[0]][::-1]]:
        why = "the shapes are those of a gated MLP"
        return [_Group(tuple(first), "likely", why, True, "mlp")]
    keys = [x for x in first if shapes[x][0] == heads.keys * heads.width]
    queries = [x for x in first if shapes[x][0] == heads.queries * heads.width]
    if heads.keys != heads.queries and len(keys) == 2 and len(queries) <= 1:
        why = "the sizes are those of config.json's heads"
        own = tuple(x for x in first if x in keys or x in queries)
        return [_Group(own, "likely", why, True, "attention")]
    return []


def _alone(
    linear: str, linears: Sequence[str], groups: Sequence[_Group], block: UnknownBlock
) -> _Group:
    """A linear of which nothing says that it shares its input."""
    outputs, inputs = block.linears[linear]
    others = [x for x in linears if x != linear and block.linears[x][1] == inputs]
    if inputs != block.width:
        if others:
            return _Group((linear,), "guess", f"{_own(others[0])} may see the same input")
        return _Group((linear,), "sure", f"no sibling takes {inputs} inputs")
    if outputs == inputs:
        if _called("output", linear):
            return _Group((linear,), "likely", "by what it is called")
        return _Group((linear,), "guess", "it is square, and its name says nothing")
    if others:
        why = f"{_own(others[0])} may see the same input"
        return _Group((linear,), "guess", why, True)
    return _Group((linear,), "likely", f"no sibling takes {inputs} inputs", True, _role([linear]))


def _taken_apart(groups: Sequence[_Group], parameter: str) -> list[_Group]:
    """Each linear alone, since a parameter may change the input for each of them (RWKV)."""
    why = f"{parameter} may change the input for each of them"
    return [
        replace(group, linears=(linear,), certainty="guess", why=why)
        if len(group.linears) > 1
        else group
        for group in groups
        for linear in group.linears
    ]


def _side_by_side(groups: list[_Group], block: UnknownBlock, settings: Config) -> list[_Group]:
    """Attention and MLP share their input where the block has one norm."""
    first = sorted((x for x in groups if x.takes and x.role), key=lambda group: group.role)
    if not only_norm(block) or [group.role for group in first] != ["attention", "mlp"]:
        return groups
    if any(group.certainty == "guess" for group in first):
        return groups
    joined = _Group(
        tuple(linear for group in first for linear in group.linears),
        "likely",
        "attention and MLP are behind one norm",
        True,
        "attention",
    )
    return [joined, *(group for group in groups if group not in first)]


def _site(
    group: _Group,
    groups: Sequence[_Group],
    block: UnknownBlock,
    heads: Heads,
    settings: Config,
) -> DerivedSite:
    """The site of a group, with what may feed it."""
    pattern = SitePattern(group.linears, transposed=block.transposed)
    others = [other.role for other in groups if other.takes and other is not group]
    if group.takes and group.role and not {"", group.role}.intersection(others):
        norm = "" if others else only_norm(block)
        pattern = replace(pattern, norm=norm or norm_before(block, group.role))
    elif len(group.linears) == 1 and not _takes_width(group.linears[0], block):
        pattern = _behind(group.linears[0], block, heads, settings) or pattern
    return DerivedSite(pattern, group.certainty, group.why)


def _behind(linear: str, block: UnknownBlock, heads: Heads, settings: Config) -> SitePattern | None:
    """The site of a linear behind its siblings."""
    parent = linear.rpartition(".")[0]
    siblings = [
        x for x in block.linears if x.rpartition(".")[0] == parent and _takes_width(x, block)
    ]
    attention, mlp = ([x for x in siblings if _called(r, x)] for r in ("attention", "mlp"))
    activation = next((settings[key] for key in _ACTIVATIONS if settings.get(key)), None)
    return behind_values(block, linear, attention, heads) or behind_up(
        block, linear, mlp, activation
    )


def _own(linear: str) -> str:
    return linear.rpartition(".")[2]
