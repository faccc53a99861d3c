"""For all tests."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import builders

# A background job of a shell ignores Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test stands in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job(tmp_path) -> Path:
    """A folder with a small model and its activations; the model's path."""
    return builders.small_job(tmp_path)[0]
