"""The file that keeps what choices were measured to cost, so that another budget costs seconds.

JSON: one table for each set of inputs and settings that errors depend on, found by its digest; in
it `errors`, by module and choice, and `divergences`, by group and choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptq_cli.core.report import LayerReport
from ptq_cli.core.settings import is_amount
from ptq_cli.errors import FileError, InputError
from ptq_cli.storage.digest import digest_words
from ptq_cli.storage.files import FULL, read_json, to_json, write_whole

SUFFIX = ".choices.json"
MAX_TABLE = 256 << 20
_FORMAT = "ptq choices 1"
_ERRORS = ("rel_err", "heldout_rel_err")


class ChoiceTable:
    """Errors of layers and divergences of predictions, by choice; on the disk by `save`.

    path: of the file, which may not be there yet
    identity: all that what is measured depends on, besides the choice, as JSON
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._own = digest_words(to_json(identity))
        own = _read(path).get(self._own, {}) if path.exists() else {}
        self.errors: dict[str, dict[str, dict[str, float | None]]] = own.setdefault("errors", {})
        self.divergences: dict[str, dict[str, float]] = own.setdefault("divergences", {})

    def add_error(self, choice: str, row: LayerReport) -> None:
        """Of a layer, rounded as a choice has it."""
        own = {name: getattr(row, name) for name in _ERRORS}
        self.errors.setdefault(row.module, {})[choice] = own

    def add_divergence(self, group: str, choice: str, kl: float) -> None:
        """Of the predictions where a group alone is rounded, in nats."""
        self.divergences.setdefault(group, {})[choice] = kl

    def has_errors(self, modules: Collection[str], choices: Collection[str]) -> bool:
        """Whether the errors of all modules at all choices are there."""
        return all(self.errors.get(module, {}).keys() >= set(choices) for module in modules)

    def has_divergences(self, group: str, choices: Sequence[str]) -> bool:
        """Whether those of a group at all choices are there."""
        return self.divergences.get(group, {}).keys() >= set(choices)

    def error(self, module: str, choice: str) -> float:
        """The error that counts: on held-out inputs where there are any."""
        own = self.errors[module][choice]
        held = own["heldout_rel_err"]
        return float(own["rel_err"] if held is None else held)  # type: ignore[arg-type]

    def save(self) -> None:
        """Write the file in one step, with what other runs have put there meanwhile. Raises
        FileError, InputError."""
        tables = _read(self.path) if self.path.exists() else {}
        mine: dict[str, Any] = {"errors": self.errors, "divergences": self.divergences}
        for kind, rows in tables.get(self._own, {}).items():
            for name, row in rows.items():
                mine[kind][name] = {**row, **mine[kind].get(name, {})}
        text = to_json({"format": _FORMAT, "tables": {**tables, self._own: mine}})
        try:
            write_whole(self.path, text)
        except FileError as error:
            error.hint = FULL.replace("-o", "--table") if error.hint == FULL else error.hint
            raise


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path, MAX_TABLE)
    tables = document.get("tables") if isinstance(document, dict) else None
    if not isinstance(document, dict) or document.get("format") != _FORMAT or not _sound(tables):
        raise InputError(f"{path}: no table of choices", hint="remove it, or name another --table")
    assert isinstance(tables, dict)
    return tables


def _sound(tables: Any) -> bool:
    """Whether everything in it is what this module writes."""
    if not isinstance(tables, dict):
        return False
    for table in tables.values():
        if not isinstance(table, dict) or not table.keys() <= {"errors", "divergences"}:
            return False
        errors, found = table.get("errors", {}), table.get("divergences", {})
        if not isinstance(errors, dict) or not isinstance(found, dict):
            return False
        rows = [row for own in errors.values() if isinstance(own, dict) for row in own.values()]
        values = [x for own in found.values() if isinstance(own, dict) for x in own.values()]
        if not all(isinstance(own, dict) for own in (*errors.values(), *found.values(), *rows)):
            return False
        numbers = [row.get("rel_err") for row in rows] + values
        numbers += [x for row in rows if (x := row.get("heldout_rel_err")) is not None]
        if not all(map(is_amount, numbers)):
            return False
    return True
