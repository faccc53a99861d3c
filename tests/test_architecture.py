"""The walls of the house, read with `ast`: who may import whom, who may touch files, how long and
how wide a function is. Each rule is one test that lists all who break it.

ORDER is the documentation of the order of imports: a module imports from its own room and from the
lines above its own, and no two modules of one room import each other in a circle.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

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


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(
        ("ptq_cli", *(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts))
    )


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed, by its full name."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
    return {dotted(path): ast.parse(path.read_text()) for path in paths}


def room(name: str) -> str:
    """`ptq_cli.storage.npy` is in `storage`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def nodes(here: str) -> list[ast.AST]:
    """All nodes of a module, walked through once for all tests."""
    return list(ast.walk(modules()[here]))


@cache
def imports(here: str) -> set[str]:
    """Full names of what a module imports, wherever in it; names for the type checker are too."""
    found = set()
    for node in nodes(here):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{here}: a relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def called(here: str) -> list[ast.Call]:
    return [node for node in nodes(here) if isinstance(node, ast.Call)]


def last_name(function: ast.expr) -> str:
    """`np.load` is `load`."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def package_imports(here: str) -> set[str]:
    """The modules of the package that a module imports, `ptq_cli.core.grid`."""
    return {
        name if name in modules() else name.rpartition(".")[0]
        for name in imports(here)
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


def test_imports_point_to_earlier_rooms():
    nowhere = [here for here in modules() if room(here) not in PLACE]
    assert nowhere == [], "say in ORDER where they stand"
    found = {here: upward(here, package_imports(here)) for here in modules()}
    assert {here: names for here, names in found.items() if names} == {}


def test_no_modules_import_each_other_in_a_circle():
    assert circle({here: package_imports(here) for here in modules()}) == []


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


def test_numerics_take_arrays_and_touch_nothing_else():
    """No files, no thread-locals, no processes: a kernel would run on other arrays as it stands."""
    found = [
        f"{here} imports {name}"
        for here in modules()
        if room(here) == "numerics"
        for name in imports(here)
        if name.split(".")[0] in FORBIDDEN_TO_PLUGINS
    ]
    assert found == []


# What plug-ins of one room have in common.
SHARED = ("formats.common", "formats.declared", "formats.fused", "formats.small_floats")


def strangers(here: str, name: str) -> bool:
    """Whether a plug-in imports what is another's."""
    if room(name) not in PLUGINS or not name.startswith("ptq_cli."):
        return False
    beside = plugin_of(name) in SHARED and room(name) == room(here)
    return plugin_of(name) != plugin_of(here) and not beside


def test_plugins_know_neither_files_nor_terminals_nor_one_another():
    found = []
    for here in modules():
        if room(here) in PLUGINS:
            found += [
                f"{here} imports {name}"
                for name in sorted(imports(here))
                if name.split(".")[0] in FORBIDDEN_TO_PLUGINS or strangers(here, name)
            ]
            names = {last_name(call.func) for call in called(here)}
            found += [f"{here} calls {name}" for name in names & (OPENING - {"load"})]
    assert found == []


def test_only_storage_opens_files():
    streams = {"ptq_cli.__main__", "ptq_cli.cli.main"}  # the three standard streams, not files
    found = []
    for here in modules():
        if room(here) != "storage":
            names = {last_name(call.func) for call in called(here) if not _harmless(call.func)}
            opening = names & OPENING - ({"open", "FileIO"} if here in streams else set())
            found += [f"{here} calls {name}" for name in sorted(opening)]
    assert found == []


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


def test_only_the_cli_imports_click_and_two_modules_of_it_rich():
    terminal = ("ptq_cli.cli.console", "ptq_cli.cli.progress")
    found = [
        f"{here} imports {name}"
        for here in modules()
        for name in sorted(imports(here))
        if (name.split(".")[0] == "rich" and here not in terminal)
        or (name.split(".")[0] == "click" and room(here) != "cli")
    ]
    assert found == []


def running(here: str) -> list[str]:
    """What in a module could run what it reads."""
    dangerous = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "subprocess", "torch"}
    if here == "ptq_cli.run.workers":
        dangerous -= {"subprocess"}  # it starts this package's own worker, without a shell
    found = sorted(name for name in imports(here) if name.split(".")[0] in dangerous)
    calls = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    for call in called(here):
        words = ast.unparse(call.func)
        if words in calls or words.startswith(("os.exec", "os.spawn")):
            found.append(words)
        found += [k.arg for k in call.keywords if k.arg in ("allow_pickle", "shell")]
    attributes = (node for node in nodes(here) if isinstance(node, ast.Attribute))
    loading = {"np.load", "numpy.load"}
    return found + [words for node in attributes if (words := ast.unparse(node)) in loading]


def test_nothing_runs_what_it_reads():
    """No pickle, eval, exec, shell; `.npy` files come through storage/npy.py alone."""
    assert {here: found for here in modules() if (found := running(here))} == {}


def test_modules_say_what_they_are():
    assert [
        here for here, tree in modules().items() if tree.body and not ast.get_docstring(tree)
    ] == []


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


# ---- how long, how wide ----

MOST_LINES, MOST_PARAMETERS = 60, 8
PUBLIC = ("ptq_cli.__init__", "ptq_cli.commands.api")  # every option is a parameter


def functions(tree: ast.AST, inside: str) -> list[tuple[str, ast.FunctionDef]]:
    """Every function and method with its full name, nested ones too."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{inside}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                found.append((name, node))
        found += functions(node, name)
    return found


def lines_of(function: ast.FunctionDef) -> int:
    """From `def` to its last line."""
    return function.end_lineno - function.lineno + 1


def parameters_of(function: ast.FunctionDef) -> int:
    """How many a caller may name; `self`, `*args` and `**options` are none."""
    own = function.args
    names = [argument.arg for argument in (*own.posonlyargs, *own.args, *own.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_a_long_and_a_wide_function_are_found():
    source = "class A:\n def f(self, a, *b, c=1, **d):\n  def g(): pass\n  return g\n"
    (method, f), (nested, g) = functions(ast.parse(source), "m")
    assert (method, lines_of(f), parameters_of(f)) == ("m.A.f", 3, 2)
    assert (nested, lines_of(g), parameters_of(g)) == ("m.A.f.g", 1, 0)


def test_no_function_is_long():
    found = {
        name
        for here, tree in modules().items()
        for name, function in functions(tree, here)
        if lines_of(function) > MOST_LINES and here not in PUBLIC
    }
    assert not found


def test_no_function_has_many_parameters():
    found = {
        name
        for here, tree in modules().items()
        for name, function in functions(tree, here)
        if parameters_of(function) > MOST_PARAMETERS and here not in PUBLIC
    }
    assert not found


def test_marks_that_ci_looks_for_by_path_stand_there():
    """.ci/run collects no other tests for them."""
    tests = Path(__file__).parent
    script = (tests.parent / ".ci" / "run").read_text("utf-8")
    for mark, places in {
        "interop": ("tests/interop", "tests/run/test_cluster.py"),
        "browser": ("tests/report/html/test_browser.py",),
    }.items():
        marked = [path for path in tests.rglob("*.py") if f"pytest.mark.{mark}" in path.read_text()]
        names = [path.relative_to(tests.parent).as_posix() for path in marked]
        assert names
        assert [name for name in names if not name.startswith(places)] == []
        assert all(re.search(rf"-m {mark} .*{place}", script) for place in places)


def test_no_benchmark_hides_a_package() -> None:
    """A script's folder comes first where modules are looked for: beside `benchmarks/gguf.py` none
    of them would find the package gguf."""
    scripts = {path.stem for path in (PACKAGE.parent / "benchmarks").glob("*.py")}
    assert scripts
    assert not {name for name in scripts if find_spec(name)}
