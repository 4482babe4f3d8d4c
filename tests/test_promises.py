"""Every promise of docs/reliability.md has a test, marked `@pytest.mark.promise(NUMBER)`."""

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"


def promised() -> dict[int, str]:
    """The numbered promises at the head of the page, each with its first line."""
    text = PAGE.read_text(encoding="utf-8")
    promises = text[text.index("## The promises") : text.index("## What is saved")]
    return {
        int(number): line for number, line in re.findall(r"^(\d+)\. (.+)", promises, re.MULTILINE)
    }


def marked() -> dict[int, list[str]]:
    """Promise -> the tests that are marked with it."""
    tests = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for decorator in map(ast.unparse, node.decorator_list):
                    mark = re.fullmatch(r"pytest\.mark\.promise\((\d+)\)", decorator)
                    if mark is not None:
                        tests[int(mark[1])].append(f"{path.name}::{node.name}")
    return dict(tests)


def test_every_promise_has_a_test_and_every_mark_is_a_promise() -> None:
    promises, tests = promised(), marked()
    assert list(promises) == list(range(1, len(promises) + 1)), "promises are numbered from 1"
    untested = [f"{number}. {promises[number]}" for number in promises if number not in tests]
    assert not untested, f"no test is marked with: {untested}"
    unknown = {number: tests[number] for number in tests if number not in promises}
    assert not unknown, f"{PAGE.name} has no such promise: {unknown}"
