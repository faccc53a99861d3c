"""config.json -> `Architecture`: everything the forward needs to know, as one frozen value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptq_cli.errors import InputError
from ptq_cli.models.families import FAMILIES, family_of, multimodal_of, text_type, ways_on
from ptq_cli.models.family import USUAL_KEYS, Config, Family
from ptq_cli.models.forward.branch import Branch
from ptq_cli.models.forward.experts import Experts
from ptq_cli.models.forward.layers import ACTIVATIONS, Linear, Norm
from ptq_cli.models.forward.multi_head import MultiHead
from ptq_cli.models.forward.reader import (
    BlockReader,
    Forward,
    count,
    make_norm,
    number,
    positive,
    real,
)
from ptq_cli.models.forward.rope import not_known
from ptq_cli.models.forward.usual import attention_of, feed_forward_of, norms_of
from ptq_cli.models.names import Names
from ptq_cli.models.ties import ties

WORKSPACE = 16 << 20  # scores, chunks of activation functions, rotations of short batches


@dataclass(frozen=True)
class Block:
    """One block of the model: what mixes tokens, and what each token goes through by itself.

    norms: by role: attention_in and mlp_in before a branch, attention_out and mlp_out after it,
        attention_sum and mlp_sum after its sum with the residual
    parallel: both branches see the residual before the block, and are added to it together
    residual_scale: of the branches before they are added
    residual_normed: what they are added to goes through the norm before them, too
    """

    mixer: Branch
    feed_forward: Branch
    norms: Mapping[str, Norm]
    parallel: bool = False
    residual_scale: float = 1.0
    residual_normed: bool = False

    @property
    def attention(self) -> MultiHead | None:
        """The mixer, where it caches keys and values of heads."""
        return self.mixer if isinstance(self.mixer, MultiHead) else None

    @property
    def experts(self) -> Experts | None:
        return self.feed_forward if isinstance(self.feed_forward, Experts) else None

    @property
    def running(self) -> int:
        """Values a token, at most, that lie between the block's inputs and its outputs."""
        both = (self.mixer.running, self.feed_forward.running)
        return sum(both) if self.parallel else max(both)

    @property
    def kept(self) -> int:
        """Values a token, at most, that are kept between two stages, the residual aside."""
        both = (self.mixer.kept, self.feed_forward.kept)
        return sum(both) if self.parallel else max(both)


@dataclass(frozen=True)
class Architecture:
    """A model as its forward needs to know it.

    transposed: linears are stored [in_features, out_features]
    inside: the beginning of the names in a block, before its number
    embedding, positions, head: names of tensors; head is the embedding where they are tied
    embedding_scale: of the embeddings; logit_scale, logit_softcap: of the logits, in this order
    embedding_norm: behind the embeddings
    projections: linears around the blocks where the embedding is narrower (OPT-350M), or none
    """

    family: str
    forward: Forward
    transposed: bool
    hidden_size: int
    vocab_size: int
    blocks: tuple[Block, ...]
    inside: str
    embedding: str
    head: str
    final_norm: Norm | None
    positions: str | None = None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    projections: tuple[Linear, ...] = ()
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def head_module(self) -> str:
        return self.head.removesuffix(".weight")

    @property
    def attentions(self) -> tuple[MultiHead, ...]:
        """What caches keys and values, one a block; none where some block caches something else."""
        found = tuple(block.attention for block in self.blocks)
        return tuple(a for a in found if a) if all(found) else ()

    def has_head(self, tensors: Collection[str]) -> bool:
        """Whether there is a head of its own, and what its inputs come from.

        tensors: names in the checkpoint
        """
        norm = self.final_norm
        normed = norm is None or not norm.affine or f"{norm.name}.weight" in tensors
        return self.head != self.embedding and self.head in tensors and normed

    def block_memory(self, n_tokens: int) -> int:
        """Bytes, at most, that `forward_block` needs for `n_tokens` packed tokens: its input, its
        output and what lies between, in float32, without the block's weights."""
        running = max(block.running for block in self.blocks)
        return 4 * n_tokens * (4 * self.hidden_size + running) + WORKSPACE

    def state_memory(self, n_tokens: int) -> int:
        """Bytes of a `State` between two stages, at most: the residual and the next inputs."""
        kept = max(block.kept for block in self.blocks)
        return 4 * n_tokens * (self.hidden_size + max(kept, self.hidden_size))


def read_architecture(config: Config, tensors: Collection[str] = ()) -> Architecture:
    """The architecture that `config` (config.json) describes.

    tensors: names in the checkpoint; they tell which prefix it uses where a family has several.
    Raises InputError for a `model_type` or a setting that is not known.
    """
    kind, family = text_type(config), family_of(config)
    if family is None or family.forward is None:
        known = sorted(kind for own in FAMILIES if own.forward for kind in own.model_types)
        raise InputError(
            f"no forward for model_type {kind!r}; known are {', '.join(known)}",
            hint=ways_on(kind),
        )
    n_tensors = len(tensors) or None
    settings = _settings(config, family, n_tensors)
    names, forward = family.names, family.forward
    keys = {**USUAL_KEYS, **family.keys}
    prefixes, heads = _places(config, names)
    prefix = _first(prefixes, f"{{}}{names.embedding}.weight", tensors)
    embedding = f"{prefix}{names.embedding}.weight"
    head = f"{_first(heads, '{}.weight', tensors)}.weight"
    # a head that is stored beside its embedding may be another, whatever config.json says
    tied = ties(config) and head not in tensors
    hidden_size = settings["hidden_size"]
    narrow = (settings.get("embedding_size") or hidden_size) != hidden_size
    bare = settings.get("no_final_norm") or not settings.get("norm_first", True)

    def norm(name: str) -> Norm:
        return make_norm(settings, forward, f"{prefix}{name}", keys, plus_one=family.plus_one)

    return Architecture(
        family=str(kind),
        forward=forward,
        transposed=family.transposed,
        hidden_size=hidden_size,
        vocab_size=number(settings, "vocab_size", keys),
        blocks=tuple(
            _block(BlockReader(
                settings, forward, names, family.transposed, family.plus_one, keys,
                f"{prefix}{names.blocks}.{index}.", index, n_tensors,
            ))
            for index in range(settings["num_hidden_layers"])
        ),
        inside=f"{prefix}{names.blocks}.",
        embedding=embedding,
        head=embedding if tied else head,
        final_norm=None if bare else norm(names.final_norm),
        positions=f"{prefix}{names.positions}.weight" if names.positions else None,
        embedding_scale=_embedding_scale(settings, forward, keys),
        embedding_norm=norm(names.embedding_norm) if names.embedding_norm else None,
        projections=tuple(Linear(prefix + name) for name in names.projections if narrow),
        logit_scale=_logit_scale(settings, keys),
        logit_softcap=_softcap(settings, keys),
    )  # fmt: skip


def _places(config: Config, names: Names) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prefixes that the text model's tensors may have, and what its head may be called."""
    multimodal = multimodal_of(config)
    if multimodal is None:
        return names.prefixes, (names.head,)
    if not multimodal.causal:
        raise InputError(
            f"tokens of a {config['model_type']} see one another in both directions; only causal"
            " is known",
            hint="bring activations with --activations, which works for any model",
        )
    return multimodal.prefixes(names), multimodal.heads(names)


def _first(words: Sequence[str], pattern: str, tensors: Collection[str]) -> str:
    """The first word with which a tensor has the pattern's name; else the first one of all."""
    return next((word for word in words if pattern.format(word) in tensors), words[0])


def _settings(config: Config, family: Family, n_tensors: int | None) -> dict[str, Any]:
    """The family's settings, checked, with the sizes that follow from others. n_tensors: in the
    checkpoint, or None"""
    full = family.settings(config)
    hidden = number(full, "hidden_size", family.keys)
    heads = number(full, "num_attention_heads", family.keys)
    count(full, "num_hidden_layers", family.keys, n_tensors)
    full["num_key_value_heads"] = full.get("num_key_value_heads") or heads
    full["head_dim"] = full.get("head_dim") or hidden // heads
    full["intermediate_size"] = full.get("intermediate_size") or 4 * hidden
    full["activation"] = full["activation"] or full.get("hidden_act")
    if heads > hidden:
        raise InputError(f"config.json has {heads} attention heads for a hidden_size of {hidden}")
    for key in ("num_key_value_heads", "head_dim", "intermediate_size"):
        number(full, key, family.keys)
    if heads % full["num_key_value_heads"]:
        raise InputError(
            f"config.json has {heads} attention heads, not a multiple of "
            f"{full['num_key_value_heads']} key heads"
        )
    if full.get("use_bidirectional_attention"):
        raise InputError("config.json asks for bidirectional attention; only causal is known")
    if not isinstance(full["activation"], str) or full["activation"] not in ACTIVATIONS:
        what = f"config.json's activation {full['activation']!r} is not known"
        raise not_known(what, ACTIVATIONS)
    return full


def _embedding_scale(settings: Config, forward: Forward, keys: Mapping[str, str]) -> float:
    if forward.embedding_scaled:
        return float(settings["hidden_size"] ** 0.5)
    return _factor(settings, "embedding_scale", keys)


def _logit_scale(settings: Config, keys: Mapping[str, str]) -> float:
    divisor = settings.get("logit_divisor")
    divided = 1.0 if divisor is None else positive(settings, "logit_divisor", keys)
    return _factor(settings, "logit_scale", keys) / divided


def _factor(settings: Config, key: str, keys: Mapping[str, str]) -> float:
    """A setting that something is multiplied by; 0 is one, too."""
    return 1.0 if settings.get(key) is None else real(settings, key, keys, least=0)


def _softcap(settings: Config, keys: Mapping[str, str]) -> float | None:
    if settings.get("logit_softcap") is None:
        return None
    return real(settings, "logit_softcap", keys, least=0)


def _block(reader: BlockReader) -> Block:
    settings, forward = reader.settings, reader.forward
    before = settings.get("norm_first", True)
    return Block(
        mixer=(forward.mixer or attention_of)(reader),
        feed_forward=(forward.feed_forward or feed_forward_of)(reader),
        norms={
            role if before else role.replace("_in", "_sum"): reader.norm(name)
            for role, name in norms_of(reader).items()
            if role.startswith(("attention_", "mlp_"))
        },
        parallel=forward.parallel(settings),
        residual_scale=_factor(settings, "residual_scale", reader.keys),
        residual_normed=bool(settings.get("residual_normed")),
    )
