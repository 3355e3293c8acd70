"""Every nox session that the workflows name exists, and the checks are those that bare `nox` runs."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

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
    assert sorted(set(matrix("checks.yml"))) == sorted(default_sessions())
    packages = re.findall(r"- tests\(([\w-]+)\)", WORKFLOWS["checks.yml"])
    assert set(packages) == {path.name for path in (ROOT / "packages").iterdir()} | {"testkit"}
    assert re.findall(r"- integration\((\d)\)", WORKFLOWS["checks.yml"]) == ["2", "4", "8"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_session_that_a_workflow_runs_exists(name):
    named = re.findall(r"nox -s ([\w-]+)", WORKFLOWS[name]) + matrix(name)
    assert named
    assert set(named) <= set(FUNCTIONS)


def test_the_declared_ranges_are_tried_on_a_schedule_with_all_tags():
    names = ["floor", "latest", "compat", "sweep", "compositions", "garbled", "survival", "mutants", "seeds"]
    assert matrix("weekly.yml") == names
    assert "schedule:" in WORKFLOWS["weekly.yml"]
    assert "fetch-depth: 0" in WORKFLOWS["weekly.yml"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit_and_a_workflow_may_only_read(name):
    uses = re.findall(r"uses: (.*)", WORKFLOWS[name])
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", use)] == []
    assert re.search(r"^permissions:\n  contents: read$", WORKFLOWS[name], re.MULTILINE)


def test_a_tag_is_published_as_itself_without_a_password():
    text = WORKFLOWS["release.yml"]
    assert "id-token: write" in text
    assert "environment: release" in text
    assert "secrets." not in text


def test_what_is_published_says_what_it_installs_and_where_it_was_built():
    text = WORKFLOWS["release.yml"]
    assert text.index("cyclonedx-py environment") < text.index("actions/attest-sbom@") < text.index("gh-action-pypi")
    assert "attestations: write" in text
    assert "attestations: false" not in text


def matrix(name):
    """The sessions of a workflow's matrix, without their parameters."""
    return re.findall(r"^          - ([\w-]+)", WORKFLOWS[name], re.MULTILINE)
