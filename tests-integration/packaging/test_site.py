"""The site that `nox -s docs` built: every public name is in it, and every page can be reached."""

from __future__ import annotations

import importlib
import pathlib
import re
import zlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SITE = ROOT / "build" / "docs"
PACKAGES = ("am_tp_styles", "am_tp_plans", "am_fsdp", "am_moe", "am_pipeline")


def documented():
    """The names of the site's inventory: four lines of text, then one compressed line for each."""
    packed = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ", 1)[0] for line in zlib.decompress(packed).decode().splitlines()}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package):
    module = importlib.import_module(package)
    missing = {f"{package}.{name}" for name in module.__all__} - documented()
    assert not missing


def test_every_package_has_a_page_of_its_own():
    listed = re.findall(r"^(am_\w+)$", (ROOT / "docs" / "api" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name.replace("-", "_") for path in (ROOT / "packages").iterdir())
    assert sorted(listed) == sorted(PACKAGES)
