"""The distribution: what is imported is declared, what is declared is pinned and installed."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("data_shards", "emoverse", "launch")
# Distributions whose import name is another.
IMPORT_NAME = {"pillow": "PIL", "ruamel.yaml": "ruamel", "flash-attn": "flash_attn"}
# Installed with a declared one: pydantic's core, jinja2's strings, torch's compiler.
COMES_WITH = {"pydantic_core": "pydantic", "markupsafe": "jinja2", "triton": "torch"}


def setup_arguments() -> dict[str, object]:
    """The literal arguments of setup(); what is no literal (find_packages) is left out."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "setup"
    )
    return {
        str(keyword.arg): ast.literal_eval(keyword.value)
        for keyword in call.keywords
        if not isinstance(keyword.value, ast.Call)
    }


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[<>=!~ \[]", requirement)[0] for requirement in requirements]


SETUP = setup_arguments()
CORE = names(SETUP["install_requires"])  # type: ignore[arg-type]
EXTRAS = {extra: names(them) for extra, them in SETUP["extras_require"].items()}  # type: ignore[attr-defined]
PINS = dict(
    (line.partition("==")[0].lower(), line.partition("==")[2])
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#") and "<=" not in line
)


def test_every_import_is_declared() -> None:
    imported = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add((node.module or "").partition(".")[0])
    declared = {
        IMPORT_NAME.get(name, name)
        for name in [
            *CORE,
            *EXTRAS["demo"],
            *EXTRAS["fast"],
            *EXTRAS["mosei"],
            "flash-attn",
            "wandb",
        ]
    }
    third_party = imported - set(sys.stdlib_module_names) - set(PACKAGES)
    assert third_party - set(COMES_WITH) <= declared


def test_what_is_declared_is_pinned_and_the_tests_run_with_it() -> None:
    for name in [*CORE, *EXTRAS["test"], *EXTRAS["demo"]]:
        installed = importlib.metadata.version(name).partition("+")[0]
        assert PINS[name.lower()] == installed, f"{name}: run `make setup`, or pin {installed}"


def test_flash_attn_is_asked_for_by_name_only() -> None:
    assert EXTRAS["flash-attn"] == ["flash-attn"]
    assert "flash-attn" not in {*CORE, *EXTRAS["test"], *EXTRAS["demo"]}


def test_the_three_packages_are_found_and_nothing_else() -> None:
    include = [pattern for name in PACKAGES for pattern in (name, f"{name}.*")]
    assert str(include).replace("'", '"')[1:-1] in (ROOT / "setup.py").read_text()
    found = setuptools.find_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in found} == set(PACKAGES)
    modules = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert {ROOT / name.replace(".", "/") for name in found} == modules, "an __init__.py is missing"


def test_every_data_file_is_packaged() -> None:
    package_data = SETUP["package_data"]
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                inside = path.relative_to(ROOT / package)
                patterns = package_data[package]  # type: ignore[index]
                packaged = any(
                    inside.match(p) or (p.endswith("/**") and p[:-3] in map(str, inside.parents))
                    for p in patterns
                )
                assert packaged, f"{path}: name it in setup.py's package_data"


def test_versions_agree() -> None:
    from emoverse import __version__

    assert SETUP["version"] == __version__
