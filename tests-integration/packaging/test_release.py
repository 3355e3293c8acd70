"""Releases of small packages from small repositories, for real: built, checked, installed, tagged and uploaded."""

from __future__ import annotations

import functools
import re

import pytest
import release as release_module

CHANGES = "## Unreleased\n\n- It changed,\n  twice.\n\n## 0.1.0 (2026-01-01)\n\n- It exists.\n"


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """Releases with one clean environment for all: these packages need nothing."""
    return functools.partial(release_module.release, environment=tmp_path_factory.mktemp("alone"))


@pytest.fixture
def pair(repository):
    repository.add("am-base")
    repository.add("am-top", needs=["am-base>=0.1,<0.2"])
    return repository


def test_a_rehearsal_leaves_tree_index_branch_tags_and_worktrees_as_they_were(pair, capsys, release):
    before = pair.state()
    release(pair.root, "am-base", "0.1.0", dry_run=True)
    assert pair.state() == before
    assert not (pair.root / "build").exists()
    assert "dry run: am-base-v0.1.0 was not tagged" in capsys.readouterr().out


def test_a_release_commits_version_and_date_to_the_branch_tags_that_commit_and_leaves_the_files(pair, release):
    pair.add("am-base", changelog=CHANGES)
    parent = pair.git("rev-parse", "HEAD")
    release(pair.root, "am-base", "0.1.1")
    assert len(set(pair.git("rev-parse", "am-base-v0.1.1^{commit}", "main", "HEAD").split())) == 1
    assert pair.git("rev-parse", "HEAD^") == parent
    assert pair.git("diff", "--name-only", "HEAD^").split() == [
        "packages/am-base/CHANGELOG.md",
        "packages/am-base/pyproject.toml",
    ]
    text = (pair.root / "packages/am-base/CHANGELOG.md").read_text()
    today = re.search(r"## 0.1.1 \((\d{4}-\d\d-\d\d)\)", text)[1]
    assert text == "# Changelog of am-base\n\n" + CHANGES.replace("Unreleased", f"0.1.1 ({today})")
    assert 'version = "0.1.1"' in (pair.root / "packages/am-base/pyproject.toml").read_text()
    assert pair.git("status", "--porcelain") == ""
    assert len(pair.git("worktree", "list").splitlines()) == 1
    assert pair.git("tag", "--list", "--format=%(contents)") == "am-base 0.1.1\n\n- It changed,\n  twice."
    released = sorted(file.name for file in (pair.root / "build" / "released").iterdir())
    assert released == ["am_base-0.1.1-py3-none-any.whl", "am_base-0.1.1.tar.gz"]


def test_a_sibling_comes_from_its_tag_and_not_from_the_checkout(pair, release):
    release(pair.root, "am-base", "0.1.0")
    pair.write("packages/am-base/src/am_base/__init__.py", "raise ImportError('this is not released')\n")
    pair.commit("Break what is not released")
    release(pair.root, "am-top", "0.1.0", dry_run=True)


def test_a_wheel_that_works_only_beside_what_it_does_not_declare_is_refused(pair, release):
    release(pair.root, "am-base", "0.1.0")
    pair.add("am-aside")
    pair.write("packages/am-aside/src/am_aside/__init__.py", "import am_base\n\n__version__ = '0.1.0'\n")
    pair.commit("Use what is not declared")
    refused(release, pair, "am-aside", "No module named 'am_base'")


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("src/am_base/__init__.py", "__version__ = '0.0.7'\n", "am-base 0.1.0 says that it is 0.0.7"),
        ("src/am_base/py.typed", None, "whl lacks am_base/py.typed"),
        ("src/stray.py", "", "whl lacks stray.py"),
        ("LICENSE", None, "LICENSE"),
        ("tests/test_it.py", None, "tar.gz lacks tests/"),
        ("README.md", "# am-base\n\n```python\nraise SystemExit('this example is old')\n```\n", "this example is old"),
        ("README.md", "# am-base\n", "has no code to run"),
    ],
)
def test_what_is_not_right_in_the_files_is_refused_and_nothing_is_tagged(repository, path, text, words, release):
    repository.add("am-base")
    if text is None:
        (repository.root / "packages/am-base" / path).unlink()
    else:
        repository.write(f"packages/am-base/{path}", text)
    repository.commit("Spoil it")
    refused(release, repository, "am-base", words)


def test_files_that_a_build_adds_are_strays(repository, release):
    repository.add("am-base")
    append(repository, '\n[tool.hatch.build.targets.wheel.force-include]\n"LICENSE" = "am_base/notes.txt"\n')
    refused(release, repository, "am-base", "whl holds am_base/notes.txt, which is no part of it")


def test_a_build_that_differs_from_one_folder_to_the_next_is_refused(repository, release):
    repository.add("am-base")
    hook = """\
import pathlib
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stamp(BuildHookInterface):
    def initialize(self, version, build_data):
        pathlib.Path(self.root, "src/am_base/stamp.py").write_text(f"made = {self.root!r}")
"""
    repository.write("packages/am-base/hatch_build.py", hook)
    append(repository, "\n[tool.hatch.build.targets.wheel.hooks.custom]\n")
    text = (repository.root / "packages/am-base/pyproject.toml").read_text()
    repository.write("packages/am-base/pyproject.toml", text.replace('"LICENSE"]\n', '"LICENSE", "hatch_build.py"]\n'))
    repository.commit("Stamp what is built")
    refused(release, repository, "am-base", "two builds of am-base differ in am_base-0.1.0-py3-none-any.whl")


def test_a_detached_head_can_be_rehearsed_but_not_released(repository, release):
    repository.add("am-base")
    repository.git("checkout", "--quiet", "--detach")
    release(repository.root, "am-base", "0.1.0", dry_run=True)
    refused(release, repository, "am-base", "HEAD is on no branch", ValueError)


def test_a_branch_that_moved_meanwhile_is_left_alone_and_nothing_is_tagged(repository, release):
    repository.add("am-base")
    # Run by the commit in the worktree, as a maintainer who works on while the checks run.
    hook = repository.root / ".git" / "hooks" / "post-commit"
    hook.parent.mkdir(exist_ok=True)
    elsewhere = f"git -C {repository.root} -c core.hooksPath=/dev/null commit --quiet --allow-empty -m 'Work on'"
    hook.write_text(f"#!/bin/sh\nenv -u GIT_DIR -u GIT_WORK_TREE -u GIT_INDEX_FILE {elsewhere}\n")
    hook.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"merge .* failed"):
        release(repository.root, "am-base", "0.1.0")
    assert repository.git("tag") == ""
    assert repository.git("log", "-1", "--format=%s") == "Work on"
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_a_release_interrupted_between_commit_and_tag_can_be_made_again(repository, release):
    repository.add("am-base")
    release(repository.root, "am-base", "0.1.0")
    repository.git("tag", "--delete", "am-base-v0.1.0")
    release(repository.root, "am-base", "0.1.0")
    assert repository.git("tag") == "am-base-v0.1.0"


def refused(release, repository, package, words, error=RuntimeError):
    """A release fails with these words, and branch, tags and tree are as before."""
    before = repository.state()
    with pytest.raises(error) as caught:
        release(repository.root, package, "0.1.0")
    assert words in str(caught.value)
    assert repository.state() == before


def append(repository, text):
    file = repository.root / "packages/am-base/pyproject.toml"
    file.write_text(file.read_text() + text)
    repository.commit("Change how it is built")
