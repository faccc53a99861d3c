"""For tests with other people's packages."""

from __future__ import annotations

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

# Nothing is killed here, and pip compiled nothing: the first process that imports one of these
# large packages leaves its bytecode to those after it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LONGEST = "test_smollm2.py"  # as long as all other files together, nearly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that both workers end together."""
    items.sort(key=lambda item: item.path.name != LONGEST)
