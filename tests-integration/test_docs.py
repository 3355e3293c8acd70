"""The code of the documentation's pages runs, and prints what the pages show.

A page whose code is for several ranks says so with the `torchrun` line that starts it.
"""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
RUNNER = DOCS / "run_page.py"
NOT_PAGES = ("benchmarks", "coverage", "packages", "api", "examples")  # packages: each tests its own README
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if p.relative_to(DOCS).parts[0] not in NOT_PAGES]
THEIRS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTEST_")

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)


def ranks_of(page):
    """How many processes a page says it is for: its torchrun line names a script that is called like the page."""
    script = re.escape(page.stem.replace("-", "_"))
    said = re.search(rf"^torchrun --standalone --nproc-per-node (\d+) {script}\.py$", page.read_text(), re.MULTILINE)
    return int(said[1]) if said else 1


def python_blocks(page):
    return re.findall(r"^```python$", page.read_text(), re.MULTILINE)


def shown_by_python(page):
    return re.findall(r"^```python\n[^`]*(?:`(?!``)[^`]*)*```\s+```text$", page.read_text(), re.MULTILINE)


ALONE = [p for p in PAGES if python_blocks(p) and ranks_of(p) == 1]
TOGETHER = [p for p in PAGES if python_blocks(p) and ranks_of(p) > 1]
COMMANDS = [p for p in PAGES if "```console" in p.read_text()]


def run(*command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(THEIRS)} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compared(output, page):
    """The blocks of a page that printed what it shows; of several ranks one is enough."""
    return {line for line in output.splitlines() if line.startswith(f"{page}:")}


def test_pages_for_one_process_run():
    output = run(RUNNER, *ALONE)
    for page in ALONE:
        assert len(compared(output, page)) == len(shown_by_python(page)), output


@pytest.mark.parametrize("page", TOGETHER, ids=[page.stem for page in TOGETHER])
def test_a_page_for_several_ranks_runs(page):
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks_of(page)}")
    output = run(*launcher, RUNNER, page)
    assert shown_by_python(page)
    assert len(compared(output, page)) == len(shown_by_python(page)), output


def test_commands_print_what_the_pages_show():
    output = run(RUNNER, "--commands", *COMMANDS)
    for page in COMMANDS:
        assert compared(output, page), output


def test_a_page_that_shows_something_else_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:2 prints\s+2\s+but the page shows\s+3"):
        run(RUNNER, page)


def messages():
    """Every string in the sources, with `…` where it is filled in."""
    found = []
    for path in [*ROOT.glob("packages/*/src/**/*.py"), *(DOCS / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_error_that_is_explained_is_one_that_is_said():
    said = messages()
    explained = re.findall(r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(explained) > 20
    assert not [words for words in explained if words.strip("… ") not in said]
