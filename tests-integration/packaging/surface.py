"""The public surface of each package as text: a change to it shows in a file that the change has to rewrite.

python tests-integration/packaging/surface.py          writes the files in `surface/`
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "surface"
PACKAGES = ("am_tp_styles", "am_tp_plans", "am_fsdp", "am_moe", "am_pipeline")


def surface(package: str) -> list[str]:
    """A line for every public name of a package and for every public member of its classes."""
    module = importlib.import_module(package)
    lines = []
    for name in sorted(module.__all__):
        thing = getattr(module, name)
        lines += _class(name, thing) if inspect.isclass(thing) else [_signature(name, thing)]
    return lines


def _class(name: str, kind: type) -> list[str]:
    lines = [f"class {_signature(name, kind)}"]
    fields = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for member in sorted({*vars(kind), *fields}):
        if not member.startswith("_"):
            value = vars(kind).get(member)
            shown = _signature(member, value) if inspect.isfunction(value) else member
            lines.append(f"    {name}.{shown}")
    return lines


def _signature(name: str, thing: Any) -> str:
    if not callable(thing):
        return f"{name}: {type(thing).__name__}"
    try:
        return f"{name}{inspect.signature(thing)}"
    except ValueError:  # a class that is written in C
        return name


if __name__ == "__main__":
    for package in PACKAGES:
        (FOLDER / f"{package}.txt").write_text("\n".join(surface(package)) + "\n")
