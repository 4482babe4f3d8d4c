"""Rules of the code base, read from the syntax trees: layers, cycles, sizes, names."""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_shards", "emoverse", "launch")
FILES = sorted(path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_MODULES = 12  # of a folder of the packages, `__init__.py` not counted

# Who may import whom.
MAY_IMPORT = {
    "data_shards": {"data_shards"},
    "emoverse": {"emoverse", "data_shards"},
    "launch": {"launch", "emoverse", "data_shards"},
}
# Never in data_shards: it must work where there is no model.
MODEL_LIBRARIES = {"torch", "transformers", "deepspeed", "peft", "sentencepiece"}
# Each large third-party package is imported in one place, so that it can be replaced and traced.
GIANTS = {
    "deepspeed": ("emoverse/engine/deepspeed_engine.py",),
    "submitit": ("launch/slurm/submit.py",),
    "webdataset": ("data_shards/build/build.py", "data_shards/shards/reader.py"),
    "flash_attn": ("emoverse/kernels/",),
    "triton": ("emoverse/kernels/",),
    "peft": ("emoverse/models/adapters.py",),
    "av": ("data_shards/media/video.py", "data_shards/media/packets.py"),
    "jinja2": ("data_shards/pages/",),
}
# What must answer without torch.
TORCH_FREE = (
    "data_shards.shards.index",
    "data_shards.plan.plan",
    "data_shards.tasks",
    "emoverse.config.schema",
    "emoverse.models.architecture",
    "emoverse.training.stages",
    "launch.cli",
    "launch.verbs.plan",
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, wherever they stand."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or ""


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def test_imports_go_one_way() -> None:
    for path in FILES:
        wrong = tops(path) & set(PACKAGES) - MAY_IMPORT[path.parts[0]]
        assert not wrong, f"{path} may not import {wrong}"
        if path.parts[0] == "data_shards":
            assert not tops(path) & MODEL_LIBRARIES, path


def test_large_packages_are_imported_in_one_place() -> None:
    for path in FILES:
        for giant in tops(path) & set(GIANTS):
            assert str(path).startswith(GIANTS[giant]), (
                f"{giant} belongs to {GIANTS[giant]}: {path}"
            )


def test_there_is_no_import_cycle() -> None:
    """Imports inside functions count too: a lazy import hides a cycle, it does not remove it."""
    graph = {name: imported_modules(path) for name, path in MODULES.items()}
    assert not find_cycle(graph)


def test_a_cycle_would_be_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def imported_modules(path: Path) -> set[str]:
    """Modules of the three packages that a file imports; `from PACKAGE import MODULE` counts."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def find_cycle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The first cycle of a depth-first search as a list of names; empty if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(graph[name]):
            if cycle := visit(other, [*path, name]):
                return cycle
        finished.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


def test_folders_have_few_modules() -> None:
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert not {str(folder): n for folder, n in counts.items() if n > MAX_MODULES}


def test_an_init_file_only_describes_its_folder() -> None:
    for path in FILES:
        if path.name == "__init__.py" and len(path.parts) > 2:
            body = tree_of(path).body
            assert [type(node) for node in body] == [ast.Expr], f"{path}: a docstring, nothing else"


def test_files_and_functions_are_short() -> None:
    for path in FILES + TESTS:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines, split it"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MAX_FUNCTION_LINES, f"{path}:{node.name} has {length} lines"


def test_every_file_has_a_short_docstring() -> None:
    for path in FILES:
        docstring = ast.get_docstring(tree_of(path))
        assert docstring, f"{path} needs a docstring"
        assert len(docstring.splitlines()) <= 16, path


def test_source_is_ascii() -> None:
    for path in FILES + TESTS:
        text = (ROOT / path).read_text(encoding="utf-8")
        lines = [index for index, line in enumerate(text.splitlines(), 1) if not line.isascii()]
        assert not lines, f"{path}: write other characters as escapes, lines {lines}"


def test_no_module_shadows_the_standard_library() -> None:
    for path in FILES:
        # Inside a package they are safe to import, but `python launch/queue.py` is not.
        assert path.stem not in sys.stdlib_module_names - {"__init__", "__main__"}, path


def test_test_modules_have_unique_names_and_no_packages() -> None:
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert len(names) == len(set(names))
    assert "__init__.py" not in names


def test_the_packages_are_the_ones_of_this_repository(run_python: RunPython) -> None:
    names = ", ".join(PACKAGES)
    code = f"import {names}; print(*[package.__file__ for package in ({names})])"
    done = run_python("-c", code)
    found = [Path(word) for word in done.stdout.split()]
    assert found == [ROOT / name / "__init__.py" for name in PACKAGES], done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_nothing_by_themselves(package: str) -> None:
    assert not list(imports(Path(package) / "__init__.py"))
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_must_answer_at_once_does_not_load_torch(module: str, run_python: RunPython) -> None:
    heavy = sorted(MODEL_LIBRARIES | {"av", "webdataset", "tensorboard"})
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_a_file_of_tests_stays_in_one_process(request: pytest.FixtureRequest) -> None:
    """Else its costly fixtures are made twice. Some pairs of pytest and xdist lose the groups."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("these tests run in one process")
    assert request.node.nodeid.endswith("@test_house.py")


def test_the_documentation_names_files_that_exist() -> None:
    """`folder/module.py` in README and docs, from the root or from one of the packages."""
    named = re.compile(r"`((?:[a-z_]+/)+[a-z_]+\.py)`")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name in named.findall(page.read_text(encoding="utf-8")):
            places = [ROOT, *(ROOT / package for package in (*PACKAGES, "tests"))]
            assert any((place / name).is_file() for place in places), f"{page.name}: {name}"
