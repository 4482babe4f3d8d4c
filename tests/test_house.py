"""The rules of the house, read from the syntax trees: imports, sizes, names."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_shards", "emoverse", "launch")
FILES = sorted(path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
# Files and functions that may be longer, each with its reason.
LONGER_FILES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}

# Who may import whom.
MAY_IMPORT = {
    "data_shards": {"data_shards"},
    "emoverse": {"emoverse", "data_shards"},
    "launch": {"launch", "emoverse", "data_shards"},
}
# Never in data_shards: it must work where there is no model.
MODEL_LIBRARIES = {"torch", "transformers", "deepspeed", "peft", "sentencepiece"}
# Each giant has its own files, so that it can be replaced, and traced, in one place.
GIANTS = {
    "deepspeed": ("emoverse/engine/deepspeed_engine.py",),
    "submitit": ("launch/slurm/submit.py",),
    "webdataset": ("data_shards/build/build.py", "data_shards/shards/reader.py"),
    "flash_attn": ("emoverse/kernels/",),
    "triton": ("emoverse/kernels/",),
    "peft": ("emoverse/models/adapters.py",),
    "av": ("data_shards/media/video.py", "data_shards/media/packets.py"),
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


def ids(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_imports_go_one_way(path: Path) -> None:
    wrong = tops(path) & set(PACKAGES) - MAY_IMPORT[path.parts[0]]
    assert not wrong, f"{path} may not import {wrong}"
    if path.parts[0] == "data_shards":
        assert not tops(path) & MODEL_LIBRARIES


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_every_giant_stays_in_its_files(path: Path) -> None:
    for giant in tops(path) & set(GIANTS):
        places = GIANTS[giant]
        at_home = any(
            str(path).startswith(place) if place.endswith("/") else str(path) == place
            for place in places
        )
        assert at_home, f"{giant} belongs to {places}, not to {path}"


@pytest.mark.parametrize("path", FILES + TESTS, ids=ids(FILES + TESTS))
def test_files_and_functions_are_short(path: Path) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    if str(path) not in LONGER_FILES:
        assert lines <= MAX_FILE_LINES, f"{path} has {lines} lines, split it"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if f"{path}:{node.name}" not in LONGER_FUNCTIONS:
                assert length <= MAX_FUNCTION_LINES, f"{path}:{node.name} has {length} lines"


def test_exceptions_to_the_budget_are_still_needed() -> None:
    for name in LONGER_FILES:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) > MAX_FILE_LINES, f"{name} is short enough now"


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_every_file_says_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(tree_of(path))
    assert docstring, f"{path} needs a header"
    assert len(docstring.splitlines()) <= 16


@pytest.mark.parametrize("path", FILES + TESTS, ids=ids(FILES + TESTS))
def test_source_is_ascii(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    odd = [number for number, line in enumerate(text.splitlines(), 1) if not line.isascii()]
    assert not odd, f"{path}: write other characters as escapes, lines {odd}"


def test_no_module_hides_one_of_the_standard_library() -> None:
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
