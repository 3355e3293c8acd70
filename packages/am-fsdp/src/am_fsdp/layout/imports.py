"""Classes by their import path."""

from __future__ import annotations

import importlib
from typing import Any


def import_class_from_path(name: str) -> Any:
    """What an import path such as `"torch.optim.AdamW"` names.

    Raises:
        ValueError: the path is not `module.name`.
        ImportError: the module cannot be imported or has no such name; says which.
    """
    module_name, _, attribute = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not module_name or not attribute:
        raise ValueError(f"an import path must look like 'package.module.Name', got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"{name!r}: cannot import {module_name!r}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ImportError(f"{name!r}: {module_name!r} has no {attribute!r}") from None


def import_classes_from_paths(class_paths: list[str] | None) -> list[Any]:
    """What each of several import paths names, in order; an empty list for None.

    Raises:
        ValueError, ImportError: from the first path that is wrong; none is skipped.
    """
    return [import_class_from_path(path) for path in class_paths or []]
