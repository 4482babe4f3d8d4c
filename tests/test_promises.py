"""Every promise of docs/reliability.md names tests, and these tests exist."""

import ast
import re
from pathlib import Path

from emoverse.run_dir.run_files import FREE_KNOBS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
NAMED = re.compile(r"`([\w/]+\.py)?(?:::(test_\w+))?`")


def functions_of(file: str) -> set[str]:
    """Names of the test functions of the one test file of this name."""
    (path,) = (ROOT / "tests").rglob(file)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named_tests(line: str) -> list[tuple[str, str]]:
    """(file, test) of a table row; `::test` belongs to the file before it, a file alone is all."""
    found, file = [], ""
    for own_file, test in NAMED.findall(line):
        file = own_file or file
        if file.startswith("test_"):
            found.append((file, test))
    return found


def test_every_promise_names_a_test_that_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("## Which test shows it") :]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 25
    for row in rows:
        named = named_tests(row)
        assert named, f"no test is named in: {row}"
        for file, test in named:
            assert not test or test in functions_of(file), f"{file}::{test} does not exist"


def test_every_promise_has_a_row() -> None:
    """The numbered promises at the head of the page are the first words of the table's groups."""
    text = PAGE.read_text(encoding="utf-8")
    promises = re.findall(r"^(\d+)\. ", text[: text.index("## What is saved")], re.MULTILINE)
    table = text[text.index("## Which test shows it") :]
    numbers = {
        number for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for number in row.split(", ")
    }
    assert numbers == set(promises)


def test_every_knob_that_a_resumed_run_may_change_is_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    listed = text[text.index("Free to change:") : text.index("With `--accept-changes`")]
    paths = {"model.base", "data.shards"}  # "paths whose content is the same"
    assert set(re.findall(r"`((?:run|model|data)\.\w+)`", listed)) == FREE_KNOBS - paths
