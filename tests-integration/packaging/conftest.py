"""Git repositories of small packages, to release from."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / ".ci"))

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "A small package."
readme = "README.md"
requires-python = ">=3.11"
license = "Apache-2.0"
license-files = ["LICENSE"]
dependencies = {dependencies}

[project.optional-dependencies]
all = {extra}

[tool.hatch.build.targets.wheel]
packages = ["src/{module}"]

[tool.hatch.build.targets.sdist]
include = ["src", "tests", "README.md", "CHANGELOG.md", "LICENSE"]
"""
README = "# {name}\n\nRänges, zwölf of them.\n\n```python\nimport {module}\n\nassert {module}.__version__\n```\n"
SOURCE = 'from importlib.metadata import version\n\n__version__ = version("{name}")\n'


@dataclasses.dataclass
class Repository:
    """A repository shaped like ours, whose packages need nothing of others."""

    root: pathlib.Path

    def git(self, *arguments):
        self.root.mkdir(exist_ok=True)
        command = ["git", "--no-optional-locks", "-C", str(self.root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def configure(self):
        """Commit and tag as nobody, whatever this machine's own settings are."""
        settings = {"user.name": "A", "user.email": "a@localhost", "commit.gpgsign": "false", "tag.gpgsign": "false"}
        for name, value in settings.items():
            self.git("config", name, value)

    def add(self, name, *, version="0.1.0", needs=(), extra=(), changelog="## 0.1.0 (unreleased)\n\n- It exists.\n"):
        """Write a package and commit it."""
        words = {"name": name, "module": name.replace("-", "_"), "version": version}
        words |= {"dependencies": list(needs), "extra": list(extra)}
        source = f"src/{words['module']}"
        files = {"pyproject.toml": PYPROJECT, "README.md": README, f"{source}/__init__.py": SOURCE}
        files = {path: text.format(**words) for path, text in files.items()}
        files |= {"CHANGELOG.md": f"# Changelog of {name}\n\n{changelog}", "LICENSE": "Do as you like.\n"}
        files |= {f"{source}/py.typed": "", "tests/test_it.py": "def test_it():\n    pass\n"}
        for path, text in files.items():
            self.write(f"packages/{name}/{path}", text)
        self.commit(f"Write {name}")

    def write(self, path, text):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def commit(self, message):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)

    def state(self):
        """All that a rehearsal must leave alone: what is checked out, staged, committed, tagged, and at work."""
        return {
            "tree": {
                str(f.relative_to(self.root)): f.read_bytes()
                for f in self.root.rglob("*")
                if f.is_file() and not {".git", ".nox", "build"} & set(f.relative_to(self.root).parts)
            },
            "index": (self.root / ".git" / "index").read_bytes(),
            "status": self.git("status", "--porcelain"),
            "head": (self.root / ".git" / "HEAD").read_text() + self.git("rev-parse", "HEAD", "HEAD^{tree}"),
            "refs": self.git("for-each-ref"),
            "worktrees": self.git("worktree", "list", "--porcelain"),
        }


@pytest.fixture(scope="session")
def repository_at():
    """What git does in a folder, which need not exist yet."""
    return Repository


@pytest.fixture(scope="session")
def clone_at(repository_at):
    """A clone of this repository's HEAD in a folder, on a branch of its own, in which nothing was released yet."""

    def clone(folder):
        made = repository_at(folder)
        made.git("clone", "--quiet", str(pathlib.Path(__file__).parents[2]), ".")
        made.git("checkout", "--quiet", "-B", "scratch")
        for tag in made.git("tag").split():
            made.git("tag", "--delete", tag)
        made.configure()
        return made

    return clone


@pytest.fixture(scope="session")
def coming_versions():
    """What the changelogs of a repository announce, or its pyproject files where those say only that something comes.

    The packages are in the order in which they can be released.
    """

    def coming(root):
        from range_plan import in_order
        from release_plan import HEADING, read_project

        versions = {}
        for package in in_order(root):
            heading = HEADING.search((root / "packages" / package / "CHANGELOG.md").read_text())["version"]
            unnamed = heading.lower() == "unreleased"
            versions[package] = read_project(root, package)["version"] if unnamed else heading
        return versions

    return coming


@pytest.fixture
def repository(tmp_path):
    """An empty one, on the branch `main`."""
    made = Repository(tmp_path / "repository")
    made.git("init", "--quiet", "--initial-branch=main")
    made.configure()
    made.write(".gitignore", "build/\n.nox/\n__pycache__/\n")
    made.commit("Begin")
    return made
