"""Who may import whom, read from the sources and the pyproject files."""

from __future__ import annotations

import ast
import pathlib
import tomllib

import pytest

PACKAGES = pathlib.Path(__file__).parents[2] / "packages"
MAY_IMPORT = {
    "am-tp-styles": set(),
    "am-tp-plans": {"am-tp-styles"},
    "am-fsdp": {"am-tp-plans"},
    "am-moe": set(),
    "am-pipeline": set(),
}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_and_declares_only_the_siblings_it_may(package):
    declared = tomllib.loads((PACKAGES / package / "pyproject.toml").read_text())["project"]["dependencies"]
    siblings = {r.split(">")[0] for r in declared if r.startswith("am-")}
    assert siblings == MAY_IMPORT[package]
    assert {m.replace("_", "-") for m in imported(package) if m.startswith("am_")} - {package} <= siblings


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_takes_a_range_of_torch_and_never_transformers(package):
    declared = tomllib.loads((PACKAGES / package / "pyproject.toml").read_text())["project"]["dependencies"]
    assert "torch>=2.11" in declared
    assert not any("==" in requirement for requirement in declared)
    assert "transformers" not in imported(package)


def imported(package):
    names = set()
    for source in (PACKAGES / package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names


def test_every_package_is_in_the_graph():
    assert {p.name for p in PACKAGES.iterdir() if p.is_dir()} == set(MAY_IMPORT)
