"""What may feed the sites of a model whose family nobody knows, by names and shapes.

Never sure, so a recipe has it in comments: whether something else reads a norm, whether its gain is
stored less one, and whether what is between two linears commutes with a scale, names do not say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ptq_cli.models.sites import SitePattern, rows_of
from ptq_cli.models.unknown_blocks import Heads, UnknownBlock

_BEFORE_ATTENTION = re.compile(
    r"input_(layer)?norm|(pre_|self_)?att(n|ention)_(layer_?)?norm|self_attn_layer_norm"
    r"|ln_attn|pre_(self_)?att\w*|(ln|norm|layer_?norm)_?1",
    re.IGNORECASE,
)
_BEFORE_MLP = re.compile(
    r"pre_?(ff|feed|mlp)\w*|(ff|ffn|mlp|feed_forward)_(layer_?)?norm|ln_mlp"
    r"|(ln|norm|layer_?norm)_?2|final_layer_norm",
    re.IGNORECASE,
)
_AFTER_ATTENTION = re.compile(r"post_att\w*norm", re.IGNORECASE)  # before the MLP, in a Llama
_BEHIND = re.compile(r"post|out|after|final", re.IGNORECASE)
_VALUES = re.compile(r"(attn_)?(w_?|to_)?(v|value)(_proj|_lin|_layer)?", re.IGNORECASE)
_QUERIES = re.compile(r"(attn_)?(w_?|to_)?(q|query)(_proj|_lin|_layer)?", re.IGNORECASE)
_GATE = re.compile(r"(ffn_)?(gate(_proj)?|w1|wi_0)", re.IGNORECASE)
_UP = re.compile(r"(ffn_)?(up(_proj)?|w3|wi_1)", re.IGNORECASE)
_BOTH = re.compile(r"(ffn_)?gate_up(_proj)?", re.IGNORECASE)


def is_gate(linear: str) -> bool:
    """Whether it is called as the one of an MLP that goes through the activation."""
    return _GATE.fullmatch(_own(linear)) is not None


def only_norm(block: UnknownBlock) -> str:
    """The one norm of a block that stands before something; "" where it has none, or several."""
    norms = _norms(block)
    return norms[0] if len(norms) == 1 and not _BEHIND.search(norms[0]) else ""


def norm_before(block: UnknownBlock, role: str) -> str:
    """The norm before the attention, or before the MLP; "" where none has such a name."""
    norms = _norms(block)
    attention = [norm for norm in norms if _BEFORE_ATTENTION.fullmatch(norm)]
    if role == "attention":
        found = attention
    elif block.readers:  # a router reads it too
        found = []
    else:
        found = [norm for norm in norms if _BEFORE_MLP.fullmatch(norm)]
        if not found and attention:
            found = [norm for norm in norms if _AFTER_ATTENTION.fullmatch(norm)]
    return found[0] if len(found) == 1 else ""


def behind_values(
    block: UnknownBlock, output: str, linears: Sequence[str], heads: Heads
) -> SitePattern | None:
    """The site of an attention's last linear, behind those of q, k and v."""
    values = [linear for linear in linears if _VALUES.fullmatch(_own(linear))]
    queries = [linear for linear in linears if _QUERIES.fullmatch(_own(linear))]
    inputs = block.linears[output][1]
    if len(values) != 1 or len(queries) != 1 or block.linears[queries[0]][0] != inputs:
        return None  # q is wider where it holds a gate
    rows = rows_of("heads", block.linears[values[0]][0], inputs, heads.queries or None)
    if isinstance(rows, str):
        return None
    return SitePattern(
        (output,), after=values[0], layout="heads", heads=heads.queries, transposed=block.transposed
    )


def behind_up(
    block: UnknownBlock, output: str, linears: Sequence[str], activation: object
) -> SitePattern | None:
    """The site of an MLP's last linear, behind those that take the block's width."""
    inputs, outputs = block.linears[output][1], [block.linears[linear][0] for linear in linears]
    up = [linear for linear in linears if _UP.fullmatch(_own(linear))]
    gated = len(up) == 1 and any(map(is_gate, linears))
    if gated and outputs == [inputs] * 2:
        return SitePattern((output,), after=up[0], transposed=block.transposed)
    if len(linears) != 1:
        return None
    if _BOTH.fullmatch(_own(linears[0])) and outputs == [2 * inputs]:
        return SitePattern(
            (output,), after=linears[0], layout="second half", transposed=block.transposed
        )
    if activation == "relu" and outputs == [inputs]:
        return SitePattern((output,), after=linears[0], transposed=block.transposed)
    return None


def _norms(block: UnknownBlock) -> list[str]:
    return [norm for norm, size in block.norms.items() if size == block.width]


def _own(module: str) -> str:
    return module.rpartition(".")[2]
