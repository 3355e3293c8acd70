"""Cannot be imported on the process of rank 1 (or at all without torchrun)."""

import os

if os.environ.get("RANK") != "0":
    raise ImportError("this process cannot import the module")


def test_never_runs():
    raise AssertionError
