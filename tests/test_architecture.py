"""The walls of the house, read with `ast`: who may import whom, who may touch files.

Imports point one way, from a later floor to an earlier one or within the same floor:

    1  errors, _version, stopping                nothing of the package
    2  values, progress                          the frozen dataclasses that cross walls
    3  numerics                                  pure maths
    4  methods, formats, models                  plug-ins; never one another
    5  registry                                  their names
    6  storage                                   the only one that opens files
    7  grid_settings, choice, layers, work,     what there is to do
       plan                                      all of it in one value
    8  workers, worker, tasks, copying, summing  where work is done, and in which order
       unit, nearest, linear, report, difference  one unit's work; what is said of it
       stream, sequential                        a whole model on its way through the blocks
    9  runner, calibration, evaluation,          the loops
       smoothing, inspection, quality, torch_capture
    10 display, live, options, config, page
    11 sources, …_job, api                       the commands as functions
    12 cli
    13 __main__, __init__
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ptq_cli

PACKAGE = Path(ptq_cli.__file__).parent

FLOORS = [
    ("errors", "_version", "stopping"),
    ("values", "progress"),
    ("numerics",),
    ("methods", "formats", "models"),
    ("registry",),
    ("storage",),
    ("grid_settings", "choice", "layers", "work", "plan"),
    (
        *("workers", "worker", "tasks", "copying", "summing", "unit", "nearest", "linear"),
        *("report", "junit", "runtimes", "stream", "sequential", "difference"),
    ),
    (
        *("runner", "calibration", "evaluation", "smoothing", "inspection", "repack"),
        *("sequential_smoothing", "quality", "torch_capture", "cost", "forecast", "forecast_jobs"),
    ),
    ("display", "live", "options", "config", "page"),
    (
        *("api", "sources", "checking", "calibrate_job", "quantize_job", "smooth_job"),
        *("repack_job", "eval_job"),
    ),
    ("cli",),
    ("__main__", "__init__"),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
PLUGINS = ("methods", "formats", "models")
FORBIDDEN_TO_PLUGINS = {
    *("os", "io", "pathlib", "shutil", "tempfile", "glob", "mmap", "subprocess", "sys"),
    *("click", "rich", "logging", "threading", "multiprocessing", "socket", "safetensors"),
}
OPENING = {"open", "fdopen", "memmap", "fromfile", "load", "loadtxt", "genfromtxt", "tofile"}
OPENING |= {"savez", "savez_compressed", "read_bytes", "read_text", "write_bytes", "write_text"}
OPENING |= {"FileIO", "unlink", "rmtree", "rename", "mkdir", "rmdir", "safe_open"}
OPENING |= {"serialize_file", "save_file", "load_file"}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(
        ("ptq_cli", *(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts))
    )


def room(name: str) -> str:
    """`ptq_cli.storage.npy` is in `storage`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    """Full names of what a module imports, wherever in it; names for the type checker are too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def calls(path: Path) -> set[str]:
    """Last names of everything that is called: `np.load(…)` is `load`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                found.add(node.func.attr)
            elif isinstance(node.func, ast.Name):
                found.add(node.func.id)
    return found


EACH = pytest.mark.parametrize("path", modules(), ids=dotted)


@EACH
def test_every_module_stands_on_a_floor_and_imports_point_down(path):
    here = room(dotted(path))
    assert here in FLOOR, f"{here}: say in this test where it stands"
    for name in imports(path):
        if name.split(".")[0] == "ptq_cli" and room(name) != here:
            there = room(name)
            if there not in FLOOR:  # `from ptq_cli import __version__`
                there = "__init__"
            assert FLOOR[there] <= FLOOR[here], f"{dotted(path)} imports {name}"


def plugin_of(name: str) -> str:
    """`ptq_cli.formats.gguf.names` belongs to the plug-in `formats.gguf`. Families of models differ
    in data, which the modules of `models` share: they are one plug-in."""
    return "models" if room(name) == "models" else ".".join(name.split(".")[1:3])


@pytest.mark.parametrize("path", [p for p in modules() if room(dotted(p)) in PLUGINS], ids=dotted)
def test_plugins_know_neither_files_nor_terminals_nor_one_another(path):
    here = dotted(path)
    for name in imports(path):
        assert name.split(".")[0] not in FORBIDDEN_TO_PLUGINS, f"{here} imports {name}"
        if room(name) in PLUGINS and name.startswith("ptq_cli."):
            assert plugin_of(name) == plugin_of(here), f"{here} imports {name}"
    assert calls(path).isdisjoint(OPENING - {"load"})


@EACH
def test_only_storage_opens_files(path):
    if room(dotted(path)) == "storage":
        return
    content = ast.parse(path.read_text())
    found = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(content)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name | ast.Attribute)
        and not _harmless(node.func)
    }
    found &= OPENING
    if dotted(path) == "ptq_cli.__main__" or dotted(path) == "ptq_cli.cli.main":
        found -= {"open", "FileIO"}  # the three standard streams, not files
    assert found == set(), dotted(path)


def _harmless(function: ast.expr) -> bool:
    """Methods of our own values that share a word with a file's: `statistics.load(site)`,
    `checkpoint.read_bytes(name)`."""
    if isinstance(function, ast.Name):
        return function.id == "load"  # a callback
    if not isinstance(function, ast.Attribute):
        return False
    owner = ast.unparse(function.value)
    words = {"load": ("np", "numpy", "pickle", "torch"), "read_bytes": ("path", "Path")}
    return function.attr in words and owner.split("(")[0] not in words[function.attr]


@EACH
def test_only_display_imports_rich_and_only_the_cli_click(path):
    here = dotted(path)
    for name in imports(path):
        top = name.split(".")[0]
        assert top != "rich" or here in ("ptq_cli.display", "ptq_cli.live"), (
            f"{here} imports {name}"
        )
        allowed = room(here) == "cli" or here == "ptq_cli.options"
        assert top != "click" or allowed, f"{here} imports {name}"


@EACH
def test_nothing_runs_what_it_reads(path):
    """No pickle, eval, exec, shell; `.npy` files come through storage/npy.py alone."""
    dangerous = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "subprocess", "torch"}
    if dotted(path) == "ptq_cli.workers":
        dangerous -= {"subprocess"}  # it starts this package's own worker, without a shell
    assert {name.split(".")[0] for name in imports(path)}.isdisjoint(dangerous)
    content = ast.parse(path.read_text())
    for node in ast.walk(content):
        if isinstance(node, ast.Call):
            words = ast.unparse(node.func)
            assert words not in ("eval", "exec", "compile", "__import__"), words
            assert words not in ("os.system", "os.popen", "np.load", "numpy.load"), words
            assert not words.startswith(("os.exec", "os.spawn")), words
            for keyword in node.keywords:
                assert keyword.arg not in ("allow_pickle", "shell"), words
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("np.load", "numpy.load")


@EACH
def test_modules_say_what_they_are(path):
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), dotted(path)


def test_plugins_are_all_registered():
    """A method, a format: one file, one line in registry.py."""
    from ptq_cli import registry

    for folder, table in (("methods", registry.METHODS), ("formats", registry.FORMATS)):
        there = {
            path.stem
            for path in (PACKAGE / folder).iterdir()
            if path.stem not in ("__init__", "__pycache__") and not path.stem.startswith("_")
        }
        named = {target.split(":")[0].split(".")[2] for target in table.values()}
        assert named <= there
        for name in table:
            record = registry.method(name) if folder == "methods" else registry.format_named(name)
            assert record.name == name
