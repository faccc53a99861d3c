"""What is known of a family of models, as one record: names, folds, the forward, names in GGUF.

A family is one file of models/families/, which holds one `Family`. Shared code reads its fields and
never asks which family it is. What a family lacks is None: without `forward` there are no
`--tokens`, without `gguf` it has no place in a GGUF file.

Names are as in transformers' modeling files, checked against them in tests/interop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.models.forward.reader import Config as Config
from ptq_cli.models.forward.reader import Forward
from ptq_cli.models.gguf_family import GgufFamily
from ptq_cli.models.names import Names
from ptq_cli.models.sites import Layout, SitePattern

_IMAGE_TOKEN = re.compile(r"(image|video|audio)_token_(id|index)")
USUAL_KEYS = {"activation": "hidden_act", "norm_eps": "rms_norm_eps"}


@dataclass(frozen=True)
class Condition:
    """What config.json has to say for a fold to be right.

    value: what `key` must be
    reason: why the site is left alone otherwise
    evidence: without config.json, a tensor beside the blocks whose presence stands for `value`
    published: without config.json and evidence, whether to take `value` for granted, as it holds
        for every published model of the family (the result notes it), or to leave the site alone
    """

    key: str
    value: object
    reason: str
    evidence: str | None = None
    published: bool = False


@dataclass(frozen=True)
class FamilySite(SitePattern):
    """A site by the names that its modules have inside a block, "{}" for the number of an expert.

    condition: when it may take factors; reason: why nothing takes them
    """

    condition: Condition | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Folds:
    """Where a block takes the factors of smoothing: the norms before qkv and mlp_in, the last of
    qkv for `output`, the last of mlp_in for `mlp_out` (models/block_sites.py).

    values, inner: how the outputs of these two linears are laid out; see models/sites.py
    norm_if, inner_if: when the norms, and the last of mlp_in, may take factors
    inner_reason: why mlp_out can have none
    attentions: the sites of each kind of attention, of which a block has one; none: only that of
        qkv and output
    norms: the norms of further kinds of blocks, by role
    """

    values: Layout = "heads"
    inner: Layout = "all"
    norm_if: Condition | None = None
    inner_if: Condition | None = None
    inner_reason: str | None = None
    attentions: tuple[tuple[FamilySite, ...], ...] = ()
    norms: tuple[Mapping[str, str], ...] = ()


def behind(activation: str) -> str:
    """Why a linear's inputs cannot be scaled."""
    return f"it is behind {activation}, which does not commute with a scale"


@dataclass(frozen=True)
class Multimodal:
    """Models with towers for images or sound beside a text model, whose family its own
    `model_type` in config.json's `text_config` tells.

    model_types: config.json's own `model_type` → the text model's, where `text_config` has none
    towers: modules that are no part of the text model, projectors included; dense unless asked for
    renames: beginnings of the checkpoint's names and of the modules' in transformers, where these
        differ; the first that fits counts
    causal: whether a token of text sees those before it only
    text_ties: of model_types, those whose head is the embedding where `text_config` alone says so
    text, head: beginnings of the names of the text model's modules and of its head in transformers
    """

    model_types: Mapping[str, str]
    towers: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    causal: bool = True
    text_ties: tuple[str, ...] = ()
    text: str = "model.language_model."
    head: str = ""

    def prefixes(self, names: Names) -> tuple[str, ...]:
        """Of the text model's tensors, in place of those of its names."""
        outer = self._stored(self.text)
        return tuple(p + own.removeprefix("model.") for own in names.prefixes for p in outer)

    def heads(self, names: Names) -> tuple[str, ...]:
        """What the output's linear may be called."""
        return self._stored(f"{self.head}{names.head}")

    def _stored(self, module: str) -> tuple[str, ...]:
        """What the checkpoint may call a module of transformers'."""
        found = (stored for stored, inside in self.renames if inside == module)
        return tuple(dict.fromkeys((*found, module)))


@dataclass(frozen=True)
class Family:
    """A family of models.

    other_types: what config.json's `model_type` may be beside the name
    transposed: linears are stored [in_features, out_features]
    own_class: transformers has a class of its own for them, which computes with `weight` itself
    plus_one: norms store gain − 1
    vocabularies: without config.json, sizes of the vocabulary that tell this family from another
        with the same names; none where names suffice
    defaults: config.json's, where a file leaves a key out
    fixed: what transformers takes for granted, whatever config.json says
    sizes: further defaults, which transformers leaves out in the `text_config` of a multimodal
        model only
    keys: our word → the family's key, where they differ. Our words are config.json's for a Llama
        and: activation, norm_eps, norm_affine (norms have weights), norm_first (norms stand before
        a branch, not behind its sum), no_final_norm, embedding_size, embedding_scale,
        residual_scale (of branches before they are added), residual_normed (what they are added to
        goes through the norm before them, too), score_size (scores are divided by its root, not
        head_dim's), attention_scale (scores are multiplied by it instead), scale_scores,
        scale_by_depth (scores are divided by the block's number), attention_softcap, logit_scale,
        logit_divisor, logit_softcap, num_experts, expert_size, shared_expert_size, dense_blocks
        (numbers of blocks without experts), sparse_step (every n-th has experts), use_windows,
        local_rope_theta (of blocks with windows)
    gguf: how GGUF files hold it (models/gguf_family.py)
    """

    name: str
    names: Names
    folds: Folds
    other_types: tuple[str, ...] = ()
    transposed: bool = False
    own_class: bool = False
    plus_one: bool = False
    vocabularies: tuple[int, ...] = ()
    defaults: Config = field(default_factory=dict)
    fixed: Config = field(default_factory=dict)
    sizes: Config = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    forward: Forward | None = None
    gguf: GgufFamily | None = None

    @property
    def model_types(self) -> tuple[str, ...]:
        return (self.name, *self.other_types)

    def settings(self, config: Config) -> dict[str, Any]:
        """config.json's settings of the language model in our words, defaults filled in."""
        text = text_config(config)
        sizes = {} if text is config else self.sizes
        settings = {**self.defaults, **sizes, **text, **self.fixed}
        for word, key in {**USUAL_KEYS, **self.keys}.items():
            if settings.get(word) is None:
                settings[word] = settings.get(key)
        return settings

    @property
    def marks(self) -> tuple[str, ...]:
        """Tensors without which a block is not of this family."""
        return (*self.names.other_norms, *self.names.marks)


def model_type(config: Config) -> str | None:
    """config.json's `model_type`; None where it is no word."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def image_tokens(config: Config) -> dict[int, str]:
    """Tokens that stand for an image, a film or a sound, and config.json's key that says so."""
    return {
        token: key
        for key, token in config.items()
        if _IMAGE_TOKEN.fullmatch(key) and isinstance(token, int)
    }


def text_config(config: Config) -> Config:
    """The part of config.json that tells of the language model; a multimodal model has others."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and text else config
