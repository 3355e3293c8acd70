"""Public names and arguments change on purpose, and those that others have documented stay."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pkgutil
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


@pytest.mark.parametrize(("package", "name", "words"), [(p, n, w) for p, n, *w in DOCUMENTED])
def test_a_documented_name_is_derived_or_called_as_documented(package, name, words):
    thing = importlib.import_module(package)
    assert name.split(".")[0] in thing.__all__
    for part in name.split("."):
        thing = getattr(thing, part)
    if words[:1] == [":"]:
        assert issubclass(thing, pkgutil.resolve_name(words[1]))
    elif words:
        # What others ask for may have a default here.
        ours = [
            o.partition("=")[0] if o.partition("=")[0] == w else o for o, w in zip(accepted(thing), words, strict=False)
        ]
        assert ours == words
        added = accepted(thing)[len(words) :]
        assert all("=" in word for word in added if word != "*"), "what is added must not be asked for"


def accepted(function):
    """The arguments of a function as the table writes them."""
    words = []
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind is argument.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(name if argument.default is argument.empty else f"{name}={argument.default!r}")
    return [word for word in words if word != "self"]
