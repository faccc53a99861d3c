"""The walls of the house, read with `ast`: who may import whom, who may touch files.

ORDER is the documentation of the order of imports: a module imports from its own room and from the
lines above its own, and no two modules of one room import each other in a circle.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ptq_cli

PACKAGE = Path(ptq_cli.__file__).parent

ORDER = """
errors _version              the tree of errors
core                         the nouns: frozen values, no behaviour beyond themselves
numerics                     arrays in, arrays out, beside their formula
methods formats models       plug-ins; never one another
registry                     their names
storage                      the only room that opens files
calibration                  statistics of inputs, from wherever they come
plan                         settings in, a plan out; every mistake of a user is found here
report                       what is said of a run: rows, totals, gates, documents, pages
run                          the loops, and where their units are worked on
evaluation                   measuring finished outputs
commands                     one file a command, as a function
cli                          click and the terminal: words in, exit code out
__main__ __init__
"""
PLACE = {
    room: number
    for number, line in enumerate(ORDER.strip().splitlines())
    for room in line.split("  ")[0].split()
}
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


def package_imports(path: Path) -> set[str]:
    """The modules of the package that a module imports, `ptq_cli.core.grid`."""
    known = {dotted(other) for other in modules()}
    return {
        name if name in known else name.rpartition(".")[0]
        for name in imports(path)
        if name.split(".")[0] == "ptq_cli"
    } - {"ptq_cli", ""}


def upward(here: str, found: set[str]) -> list[str]:
    """Imports of `here` that do not point to its own room or to an earlier line of ORDER."""
    mine = PLACE[room(here)]
    return [
        name for name in sorted(found) if room(name) != room(here) and PLACE[room(name)] >= mine
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or nothing."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        for other in sorted(graph.get(name, ())) if name not in done else ():
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


@EACH
def test_imports_point_to_earlier_rooms(path):
    here = dotted(path)
    assert room(here) in PLACE, f"{here}: say in ORDER where it stands"
    assert upward(here, package_imports(path)) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle({dotted(path): package_imports(path) for path in modules()}) == []


def test_a_planted_upward_import_and_a_planted_circle_are_found():
    assert upward("ptq_cli.core.grid", {"ptq_cli.errors", "ptq_cli.run.loop"}) == [
        "ptq_cli.run.loop"
    ]
    assert upward("ptq_cli.methods.rtn", {"ptq_cli.formats.common"}) == ["ptq_cli.formats.common"]
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}
    assert circle(graph) == ["a", "b", "c", "a"]
    assert circle({**graph, "c": {"d"}}) == []


def test_nothing_stands_flat_beside_the_rooms():
    flat = {path.stem for path in PACKAGE.glob("*.py")}
    assert flat == {"__init__", "__main__", "errors", "registry", "_version"}


def plugin_of(name: str) -> str:
    """`ptq_cli.formats.gguf.metadata` belongs to the plug-in `formats.gguf`. Families of models
    differ in data, which the modules of `models` share: they are one plug-in."""
    return "models" if room(name) == "models" else ".".join(name.split(".")[1:3])


SHARED = ("formats.common",)  # what plug-ins of one room have in common


@pytest.mark.parametrize("path", [p for p in modules() if room(dotted(p)) in PLUGINS], ids=dotted)
def test_plugins_know_neither_files_nor_terminals_nor_one_another(path):
    here = dotted(path)
    for name in imports(path):
        assert name.split(".")[0] not in FORBIDDEN_TO_PLUGINS, f"{here} imports {name}"
        if room(name) in PLUGINS and name.startswith("ptq_cli."):
            own = plugin_of(name) == plugin_of(here)
            beside = plugin_of(name) in SHARED and room(name) == room(here)
            assert own or beside, f"{here} imports {name}"
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
        assert top != "rich" or here in ("ptq_cli.cli.console", "ptq_cli.cli.progress"), (
            f"{here} imports {name}"
        )
        allowed = room(here) == "cli" or here == "ptq_cli.cli.options"
        assert top != "click" or allowed, f"{here} imports {name}"


@EACH
def test_nothing_runs_what_it_reads(path):
    """No pickle, eval, exec, shell; `.npy` files come through storage/npy.py alone."""
    dangerous = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "subprocess", "torch"}
    if dotted(path) == "ptq_cli.run.workers":
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
