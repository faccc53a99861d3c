"""For all tests."""

from __future__ import annotations

import compileall
import gc
import os
import signal
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

import ptq_cli
from ptq_cli.run import workers
from tests import builders

# A background job of a shell ignores Ctrl-C, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hundreds of processes are started, and find the modules compiled.
compileall.compile_dir(Path(ptq_cli.__file__).parent, quiet=2)

# What tests run in keeps memory that is freed, as the tool's own workers do: a sixth of a long run
# would go into fetching pages again.
os.environ.update(workers.KEEP_MEMORY)

# Of several test workers each has a core: with threads of their own, BLAS and torch would wait for
# one another, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    threadpool_limits(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-case", metavar="FOLDER", help="of each test there, one case only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, by the seconds of their mark `slow`, so that all workers end together."""
    folder = config.getoption("one_case")
    if folder is not None:
        items[:] = one_case(items, config.rootpath / folder)

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("slow")
        return mark.args[0] if mark and mark.args else 0

    items.sort(key=seconds, reverse=True)


def one_case(items: list[pytest.Item], folder: Path) -> list[pytest.Item]:
    """Of each parametrized test in a folder the first case; all others."""
    found = {}
    for item in items:
        name = item.nodeid
        found.setdefault(name.partition("[")[0] if folder in item.path.parents else name, item)
    return list(found.values())


def pytest_collection_finish() -> None:
    """Thousands of tests are collected, and live to the end: no collection of garbage need look at
    them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _environment():
    """No test cuts the power, so what it writes need not be on the disk before it goes on. No
    process of a test writes compiled modules: one whose disk is full or that is killed could leave
    half of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # fails as fsync does on what is not open
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test stands in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job(tmp_path) -> Path:
    """A folder with a small model and its activations; the model's path."""
    return builders.small_job(tmp_path)[0]


@pytest.fixture
def undrawn(monkeypatch):
    """Charts of a page are without their picture, which takes most of its time: for tests of its
    tables, titles and captions."""
    from ptq_cli.report.html import drawing

    monkeypatch.setattr(drawing, "_as_svg", lambda figure, name, css: "<svg/>")
