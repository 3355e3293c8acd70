"""Every nox session that the workflows name exists, and the checks are those that bare `nox` runs."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
TREE = ast.parse((ROOT / "noxfile.py").read_text())
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}


def default_sessions() -> list[str]:
    (assigned,) = (
        node.value
        for node in TREE.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "nox.options.sessions"
    )
    return ast.literal_eval(assigned)


def test_the_checks_are_what_bare_nox_runs():
    listed = re.findall(r"^          - ([\w-]+)", WORKFLOWS["checks.yml"], re.MULTILINE)
    assert sorted(set(listed)) == sorted(default_sessions())
    packages = re.findall(r"- tests\(([\w-]+)\)", WORKFLOWS["checks.yml"])
    assert set(packages) == {path.name for path in (ROOT / "packages").iterdir()} | {"testkit"}
    assert re.findall(r"- integration\((\d)\)", WORKFLOWS["checks.yml"]) == ["2", "4", "8"]


def test_a_session_that_a_workflow_runs_exists():
    named = re.findall(r"nox -s ([\w-]+)", "\n".join(WORKFLOWS.values()))
    assert named
    assert set(named) <= set(FUNCTIONS)
