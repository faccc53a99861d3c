"""For tests with other people's packages."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

LONGEST = (  # each takes more than a quarter of a minute
    "test_smollm2.py",
    "test_architectures.py",
    "test_runtimes.py",
    "test_loading.py",
    "test_small_floats.py",
)


@pytest.fixture(scope="module", autouse=True)
def _bytecode_is_kept() -> Iterator[None]:
    """Nothing is killed here, and pip compiled nothing: the first process that imports one of these
    large packages leaves its bytecode to those after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that both workers end together (--no-loadscope-reorder)."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
