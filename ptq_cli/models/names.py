"""What the modules of a family of models are called, as in transformers' modeling files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """The modules of a mixture of experts inside a block.

    router: weighs the experts; runtimes keep it in floating point, it is no Linear of theirs
    expert: one expert, "{}" is its number; `inputs` (gate, up) and `output` are inside it
    interleaved: where all experts are stored as one tensor (models/experts.py), gate and up take
        turns in it; else they are its halves
    fused_by_loaders: runtimes take the experts one by one and fuse them when they load them; else
        only those that read the formats of `linears_in` take them one by one, and every expert is
        then a Linear of theirs, also where it is left dense
    shared: an expert that every token goes through, with the same linears inside
    shared_gate: weighs it, and is as little a Linear
    """

    router: str
    expert: str
    inputs: tuple[str, ...]
    output: str
    interleaved: bool = False
    fused_by_loaders: bool = True
    linears_in: tuple[str, ...] = ()
    shared: str = ""
    shared_gate: str = ""

    @property
    def routers(self) -> tuple[str, ...]:
        """The modules that weigh experts, and see what they see."""
        return (self.router, self.shared_gate) if self.shared_gate else (self.router,)


@dataclass(frozen=True)
class Names:
    """What the modules of a family are called, inside a block (`<prefix><blocks>.<number>.`) unless
    said otherwise.

    qkv, output: linears of the attention; one name in qkv is a fused one
    mlp_in, mlp_out: linears of the MLP where it has no experts; one name in mlp_in is the only
        linear before the activation, or gate and up fused
    norms: role → name: attention_in and mlp_in before a branch, attention_out and mlp_out behind
        it, q and k on heads
    prefixes: of the model's tensors; the first under which the embedding is found counts
    blocks, embedding, final_norm, positions, projections: after the prefix; learned positions, and
        the linears before and behind the blocks where the embedding is narrower
    embedding_norm: behind the embeddings, or none
    head: the output's linear, from the root
    alike: further linears of a block that share an input, one tuple each
    dense: further modules of a block that stay in floating point: no Linear of the runtimes, or too
        narrow to be worth it
    buffers: further tensors that may lie in a block and read the inputs of none of its linears
    marks: tensors that tell the family from others by names alone, beside its norms
    """

    qkv: tuple[str, ...]
    output: str
    norms: Mapping[str, str]
    mlp_in: tuple[str, ...] = ()
    mlp_out: str = ""
    experts: ExpertNames | None = None
    prefixes: tuple[str, ...] = ("model.",)
    blocks: str = "layers"
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    positions: str | None = None
    embedding_norm: str | None = None
    projections: tuple[str, ...] = ()
    alike: tuple[tuple[str, ...], ...] = ()
    dense: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    marks: tuple[str, ...] = ()

    @property
    def sharing(self) -> tuple[tuple[str, ...], ...]:
        """Linears of a block that share an input; runtimes join them into one matrix."""
        experts = self.experts.inputs if self.experts else ()
        return (self.qkv, self.mlp_in, experts, *self.alike)

    @property
    def routers(self) -> tuple[str, ...]:
        """Modules of a block that are never quantized unless asked for."""
        return (*(self.experts.routers if self.experts else ()), *self.dense)

    @property
    def other_norms(self) -> tuple[str, ...]:
        """Gains of norms that feed no linear: on heads, or behind a branch."""
        roles = (role for role in self.norms if not role.endswith("_in"))
        return tuple(f"{self.norms[role]}.weight" for role in roles)
