"""The README's code runs as it stands. Blocks marked `py` need transformers; `python` blocks the package alone."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from am_testkit import as_script

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```py(?:thon)?\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_a_block_of_the_readme_runs(block, tmp_path):
    script = tmp_path / "snippet.py"
    script.write_text(block)
    command = [sys.executable, as_script.__file__, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
