"""`compat` in a clone of HEAD: before any release, and after all five were released and one of them then changed."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from release import release

CONSTRAINTS = os.environ.get("AM_CONSTRAINTS", "")
# A model with experts over two stages of two tensor ranks each: every package is at work in it.
FEW = ("-k", "pp2-tp2")
PLANS = "packages/am-tp-plans/src/am_tp_plans/__init__.py"
FSDP = "packages/am-fsdp/src/am_fsdp/__init__.py"


@pytest.fixture(scope="module")
def clone(clone_at, tmp_path_factory):
    return clone_at(tmp_path_factory.mktemp("compat") / "clone")


@pytest.fixture(scope="module")
def released(clone, coming_versions, tmp_path_factory):
    """The clone in which all packages have just been released; the environment of `compat` is kept in it."""
    settings = {"constraints": CONSTRAINTS or None, "environment": tmp_path_factory.mktemp("alone")}
    versions = coming_versions(clone.root)
    for package, version in versions.items():
        release(clone.root, package, version, **settings)
    assert len(clone.git("tag").split()) == len(versions) == 5
    return clone


@pytest.fixture
def changed(released):
    """Commits a change of text in files of the clone; undone afterwards."""
    before = released.git("rev-parse", "HEAD")

    def change(path, old, new):
        text = (released.root / path).read_text()
        assert old in text
        released.write(path, text.replace(old, new))
        released.commit(f"Change {path}")

    yield change
    released.git("reset", "--quiet", "--hard", before)


def test_before_any_release_it_says_so_and_tries_nothing(clone):
    code, output = compat(clone)
    assert code == 0
    assert "am-fsdp: no tag am-fsdp-vVERSION, nothing released yet" in output
    assert output.splitlines()[-1] == "nothing released yet: no package has a tag, so there was nothing to try"
    assert not (clone.root / ".nox").exists()


def test_a_change_that_keeps_what_others_use_passes_with_every_released_package(released, changed):
    changed(PLANS, '__version__ = version("am-tp-plans")\n', '__version__ = version("am-tp-plans")\nADDED = True\n')
    code, output = compat(released, *FEW)
    assert code == 0, output
    assert output.splitlines()[-1] == "5 of 5 passed"
    assert output.count("\n1 passed, ") == 5
    assert "changed since their own last tags: am-tp-plans\n" in output
    assert "changed since their own last tags: none\n" in output


def test_a_name_that_a_released_sibling_uses_cannot_go_unnoticed(released, changed):
    changed(
        PLANS,
        "from am_tp_plans.sources.translate import get_hf_tp_shard_plan, ",
        "from am_tp_plans.sources.translate import ",
    )
    changed(PLANS, '    "get_hf_tp_shard_plan",\n', "")
    # The checkout itself is of one piece: its own am-fsdp takes the name from elsewhere.
    changed(FSDP, "from am_tp_plans import get_hf", "from am_tp_plans.sources.translate import get_hf")
    code, output = compat(released, "am-tp-styles", "am-fsdp", *FEW)
    assert code != 0
    failed = output[output.index("1 of 2 failed, see above:") :]
    assert "- am-fsdp-v0.1.0 with the others of the checkout" in failed
    assert "changed since their own last tags: am-tp-plans" in failed
    assert "am-tp-styles-v" not in failed
    assert "cannot import name 'get_hf_tp_shard_plan' from 'am_tp_plans'" in output


def compat(repository, *arguments):
    """The exit status and what was printed."""
    script = pathlib.Path(repository.root, ".ci", "ranges.py")
    command = [sys.executable, str(script), "compat", f"--constraints={CONSTRAINTS}", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout
