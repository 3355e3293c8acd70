"""Public names and arguments change on purpose, and those that others have documented stay."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from surface import FOLDER, PACKAGES, surface

LINES = (FOLDER / "documented.txt").read_text().splitlines()
DOCUMENTED = [line.split() for line in LINES if line and not line.startswith("#")]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_surface_is_what_its_file_says(package):
    recorded = (FOLDER / f"{package}.txt").read_text().splitlines()
    assert surface(package) == recorded, "if this is on purpose: python tests-integration/packaging/surface.py"


@pytest.mark.parametrize(("package", "name", "arguments"), [(p, n, a) for p, n, *a in DOCUMENTED])
def test_a_documented_name_takes_its_documented_arguments(package, name, arguments):
    module = importlib.import_module(package)
    assert name in module.__all__
    if arguments:
        taken = list(inspect.signature(getattr(module, name)).parameters)
        assert [argument for argument in taken if argument in arguments] == arguments, "in the documented order"
