"""Settings that were asked for and that nothing would read are errors.

A setting is read where its class is (a smoothing has GPTQ's settings only `--then gptq`), and where
what its field `needs` holds: mappings from names of settings, or of FACTS, to the values that let
it be read. Every mapping must hold, by one of its names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ptq_cli.core.settings import settings_fields
from ptq_cli.errors import InputError
from ptq_cli.plan.grid_settings import settings_classes
from ptq_cli.registry import METHODS, method

Field = dataclasses.Field[Any]

# What a run is, besides its settings, in the words of options.
FACTS = {
    "calibration": "calibration (--tokens, --calibration or --activations)",
    "in_sequence": "--tokens, --text or --chat, without --parallel-layers",
    "tokens": "--tokens, --text or --chat",
    "mix": "a mix of GGUF's types (--scheme Q4_K_M and its like)",
}


def refuse_unused(
    command: str,
    given: Mapping[str, Any],
    recipe: Mapping[str, Any],
    read: Iterable[Any],
    **facts: bool,
) -> None:
    """Refuse the first setting that was asked for and does nothing.

    given: option values, None and () are "not given"; recipe: settings that a recipe states;
    read: the settings that the run reads; facts: those of FACTS

    Raises:
        InputError: it names the setting, and what would make it count.
    """
    read = tuple(read)
    fields = {field.name: field for part in read for field in dataclasses.fields(part)}
    values = {name: getattr(part, name) for part in read for name in vars(part)} | facts
    known = {field.name: field for field, _ in settings_fields(*settings_classes(command))}
    asked = {name: value for name, value in given.items() if value not in (None, ())}
    for name, value in {**recipe, **asked}.items():
        if name not in known:
            continue
        needs = list(_missing(name, fields, values))
        if needs:
            said = option_word(known[name], value) if name in asked else f"{name} (of the recipe)"
            raise InputError(f"{said} does nothing here", hint=f"it needs {' and '.join(needs)}")


def _missing(name: str, fields: Mapping[str, Field], values: Mapping[str, Any]) -> Iterator[str]:
    """What a setting needs and does not have, in words."""
    if name not in fields:
        yield _one_of(fields["then"], _methods_that_read(name, fields["then"]))
        return
    for need in fields[name].metadata.get("needs", ()):
        if not any(values[key] in wanted for key, wanted in need.items()):
            yield " or ".join(
                FACTS[key] if key in FACTS else _one_of(fields[key], wanted)
                for key, wanted in need.items()
            )


def _one_of(field: Field, values: Sequence[Any]) -> str:
    """`--activation-scheme dynamic-token or static`."""
    first, *others = values
    return " or ".join([option_word(field, first), *others])


def _methods_that_read(name: str, then: Field) -> list[str]:
    """The choices of `then` under which a setting is read."""
    return [
        choice
        for choice in then.metadata["choices"]
        if choice in METHODS
        and name in (field.name for field in dataclasses.fields(method(choice).settings))
    ]


def option_word(field: Field, value: Any) -> str:
    """A setting as an option: `--refine 2`, `--no-clip`."""
    word = field.name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{word}" if value else f"--{field.metadata.get('off', 'no-' + word)}"
    return f"--{word}" if isinstance(value, tuple | list) else f"--{word} {value}"
