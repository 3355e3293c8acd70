"""The code of the README runs as it stands, from top to bottom."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from am_testkit import as_script

README = pathlib.Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.skipif(os.environ.get("WORLD_SIZE", "2") != "2", reason="runs once, with the two-rank suite")


def test_the_code_of_the_readme_runs(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)))
    command = [sys.executable, as_script.__file__, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "gradient norm" in done.stdout
    assert "stage 1  model.layers.2-3" in done.stdout
