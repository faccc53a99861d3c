"""Which of ggml's types each tensor gets: a mix's, and those that are asked for one by one.

`--tensor-type` and its kin, and `type` of a recipe's [[layers]], change what the mix says. Of two
that name one tensor the later counts, options after the recipe's rules, and
`--output-tensor-type` and `--token-embedding-type` after both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ptq_cli.calibration.source import Source
from ptq_cli.core.layer import ALL_TOLD, GgufTypes
from ptq_cli.core.names import fold_names
from ptq_cli.core.plugins import Format
from ptq_cli.core.text import CONVERTED
from ptq_cli.errors import InputError, stated_in
from ptq_cli.formats.gguf.types import TYPES
from ptq_cli.models.families import family_of
from ptq_cli.models.gguf_names import names_of_model
from ptq_cli.plan.grid_settings import GRID_KEYS, GridSettings
from ptq_cli.plan.mixes import (
    DENSE_TYPES,
    LAST_RESORT,
    NEEDS_IMPORTANCE,
    ModelFacts,
    fallback,
    holds,
    is_mix,
    mix_name,
    mix_named,
    mix_types,
    role_of,
)
from ptq_cli.plan.name_patterns import matches, pattern_of
from ptq_cli.storage.checkpoint import Checkpoint

HOLDING = ("gguf", "ptq")  # formats that hold every type


@dataclass(frozen=True)
class TensorTypes:
    """The types of a file's tensors, by their names in the checkpoint; empty without a mix.

    mix: its name; names: GGUF's, of all tensors that have one
    types: of those that the mix rounds, and of those that are left dense in a type that was asked
        for
    """

    mix: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)

    def of(self, tensor: str) -> str:
        """The type of a tensor that is quantized."""
        return self.types.get(tensor, mix_named(self.mix).main)

    @property
    def dense(self) -> dict[str, str]:
        """Those that are left dense."""
        return {name: kind for name, kind in self.types.items() if kind in DENSE_TYPES}

    def told_of(self, skipped: Iterable[str]) -> GgufTypes:
        """What the layers of the file do not tell. skipped: tensors that are copied"""
        if not self.mix:
            return ALL_TOLD
        dense = self.dense
        stored_as = {name: dense[name] for name in skipped if name in dense}
        return GgufTypes(stored_as, mix_named(self.mix).file_type)


def tensor_types(
    checkpoint: Checkpoint, settings: GridSettings, fmt: Format, source: Source | None
) -> TensorTypes:
    """The type of each tensor that a mix rounds, changed as was asked.

    source: where statistics come from; None: nothing tells which inputs matter

    Raises:
        InputError: another format, rules that say what a mix says, a type that is not known, that
            the width does not allow, or that only some experts of one tensor get.
    """
    _check_rules(settings)
    if not is_mix(settings.scheme):
        return TensorTypes()
    if fmt.name not in HOLDING:
        raise InputError(
            f"{settings.scheme} is a mix of GGUF's types, which format {fmt.name} does not hold",
            hint="leave --format out",
        )
    if mix_name(settings.scheme) in NEEDS_IMPORTANCE and source is None:
        raise InputError(
            f"{settings.scheme} needs to know which inputs matter, and there is no calibration",
            hint="--tokens FILE, --imatrix FILE, or --scheme Q2_K, which does without",
        )
    names = gguf_names(checkpoint)
    shapes = _shapes(checkpoint, names)
    facts = model_facts(checkpoint, important=source is not None)
    of_gguf = mix_types(settings.scheme, facts, shapes, settings.pure)
    types = {
        name: of_gguf[own]
        for name, own in names.items()
        if own in of_gguf and len(checkpoint.tensors[name].spec.shape) == 2
    }
    asked = dict(_asked(checkpoint, settings, names, types))
    _check_experts(names, types | asked)
    if settings.on_misfit == "error":
        _check_widths(asked, {name: shapes[names[name]] for name in asked})
    return TensorTypes(settings.scheme, names, types | asked)


def known_type(where: str, word: Any) -> str:
    """ggml's name of a type, in whatever case it was written. Raises InputError for others."""
    kind = word.upper() if isinstance(word, str) else ""
    if kind not in (*TYPES, *DENSE_TYPES):
        known = ", ".join((*TYPES, *DENSE_TYPES))
        raise InputError(f"{where}: no type {word!r}", hint=f"choose one of {known}")
    return kind


def gguf_names(checkpoint: Checkpoint) -> dict[str, str]:
    """GGUF's names of those tensors that have one. Raises InputError for a model that GGUF does
    not hold here."""
    if checkpoint.gguf is not None:
        return {name: tensor.spec.name for name, tensor in checkpoint.gguf.tensors.items()}
    with stated_in(checkpoint.path):  # no format holds types of tensors without their names
        names = names_of_model(checkpoint.config, CONVERTED)
    found = {}
    for name in checkpoint.tensors:
        with suppress(InputError):
            found[name] = names.tensor_name(name)
    return found


def _shapes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes by GGUF's names, in which the experts of a block are one tensor."""
    members: dict[str, list[str]] = {}
    for name, own in names.items():
        members.setdefault(own, []).append(name)
    shapes = {}
    family = family_of(checkpoint.config)
    view = checkpoint.gguf
    transposed = family is not None and family.transposed and view is None
    held = checkpoint.tensors if view is None else view.tensors
    for own, stored in members.items():
        shape = held[stored[0]].spec.shape
        if transposed and own.startswith("blk."):
            shape = shape[::-1]  # [in_features, out_features]
        shapes[own] = (len(stored), *shape) if len(stored) > 1 else shape
    return shapes


def model_facts(checkpoint: Checkpoint, important: bool) -> ModelFacts:
    """What a mix asks of a model, from a GGUF file's key-values or from config.json."""
    if checkpoint.gguf is not None:
        return facts_of_metadata(checkpoint.gguf.header.metadata, important)
    family = family_of(checkpoint.config)
    settings = dict(checkpoint.config) if family is None else family.settings(checkpoint.config)
    heads = _whole(settings.get("num_attention_heads"), 1)
    return ModelFacts(
        architecture=names_of_model(checkpoint.config).architecture,
        blocks=_whole(settings.get("num_hidden_layers")),
        heads=heads,
        kv_heads=_whole(settings.get("num_key_value_heads"), heads),
        experts=_whole(settings.get("num_experts")),
        important=important,
    )


def facts_of_metadata(metadata: Mapping[str, Any], important: bool) -> ModelFacts:
    """What a mix asks of a model, from a GGUF file's key-values."""
    architecture = str(metadata.get("general.architecture"))

    def number(key: str, default: int = 0) -> int:
        return _whole(metadata.get(f"{architecture}.{key}"), default)

    heads = number("attention.head_count", 1)
    kv_heads = number("attention.head_count_kv", heads)
    experts = number("expert_count")
    return ModelFacts(architecture, number("block_count"), heads, kv_heads, experts, important)


def _whole(value: Any, default: int = 0) -> int:
    """A number, or that of the first block where there is one for each."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and first >= 0 else default


def _asked(
    checkpoint: Checkpoint,
    settings: GridSettings,
    names: Mapping[str, str],
    types: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """Tensors and the types that are asked for them, those that count last. Raises InputError."""
    yield from _by_pattern(checkpoint, settings, names, types)
    yield from _ends(checkpoint, settings, names, types)


def _by_pattern(
    checkpoint: Checkpoint,
    settings: GridSettings,
    names: Mapping[str, str],
    types: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """The rules of a recipe, then --tensor-type."""
    rules = [(rule["match"], rule["type"]) for rule in settings.layers if "type" in rule]
    said = [(f"[[layers]] match = {word!r}", word, kind) for word, kind in rules]
    for text in settings.tensor_type:
        word, _, kind = text.rpartition("=")
        if not word:
            raise InputError(f"--tensor-type {text!r}: not REGEX=TYPE", hint="ffn_down=Q6_K")
        said.append((f"--tensor-type {text}", word, kind))
    for where, word, kind in said:
        pattern = pattern_of(where, word, checkpoint, names)
        found = [name for name in types if matches(pattern, checkpoint.tensors[name], names)]
        if not found:
            raise InputError(f"{where}: matches no tensor that a type could be given")
        yield from dict.fromkeys(found, known_type(where, kind)).items()


def _ends(
    checkpoint: Checkpoint,
    settings: GridSettings,
    names: Mapping[str, str],
    types: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    """The head, which may be the embedding, and the embedding."""
    roles = {name: role_of(names[name]) for name in types}
    tied = "output" not in roles.values() and not settings.token_embedding_type
    asked = (
        ("--output-tensor-type", settings.output_tensor_type, "token_embd" if tied else "output"),
        ("--token-embedding-type", settings.token_embedding_type, "token_embd"),
    )
    for option, kind, wanted in asked:
        found = [name for name, role in roles.items() if role == wanted]
        if kind and not found:
            raise InputError(f"{option} {kind}: {checkpoint.path} has no such tensor")
        if kind:
            yield from dict.fromkeys(found, known_type(option, kind)).items()


def _check_rules(settings: GridSettings) -> None:
    """Refuse rules of a recipe that say of a tensor what only a mix says, or what a mix says."""
    mixed = is_mix(settings.scheme)
    for rule in settings.layers:
        where = f"[[layers]] match = {rule['match']!r}"
        if is_mix(rule.get("scheme", "")):
            hint = f"scheme = {rule['scheme']!r} for the file, type = for a tensor"
            raise InputError(f"{where}: {rule['scheme']} is a mix of a whole file", hint=hint)
        if "type" in rule and not mixed:
            hint = 'scheme = "Q4_K_M" above, or another mix'
            raise InputError(f"{where}: type goes with a mix of GGUF's types", hint=hint)
        others = [key for key in GRID_KEYS if key in rule and (key, rule[key]) != ("bits", 16)]
        if mixed and others:
            raise InputError(
                f"{where}: {others[0]} has no place beside {settings.scheme}",
                hint='say type = "Q6_K", for instance',
            )


def _check_experts(names: Mapping[str, str], types: Mapping[str, str]) -> None:
    """Refuse two types in one tensor. Raises InputError."""
    found: dict[str, str] = {}
    for name, kind in types.items():
        if found.setdefault(names[name], kind) != kind:
            raise InputError(
                f"{names[name]} holds all experts of a block, and would be {found[names[name]]}"
                f" and {kind}",
                hint="name every expert, or the tensor of all",
            )


def _check_widths(asked: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse types whose blocks do not divide a row, each with what llama.cpp falls back to."""
    wrong: dict[tuple[str, int], list[str]] = {}
    for name, kind in asked.items():
        if not holds(kind, shapes[name][-1]):
            wrong.setdefault((kind, shapes[name][-1]), []).append(name)
    for (kind, columns), names in wrong.items():
        other = fallback(kind, columns)
        instead = other if other != kind else LAST_RESORT
        raise InputError(
            f"{fold_names(names)}: {kind} has blocks of {TYPES[kind].block} columns, which do not"
            f" divide {columns}",
            hint=f"{instead}, as llama.cpp would take, or --on-misfit keep",
        )
