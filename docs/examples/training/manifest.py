"""The manifest of a checkpoint: size and digest of each file, written last, so that what has one is complete."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import torch.distributed as dist

NAME = "manifest.json"


def write(folder: pathlib.Path) -> None:
    """Describe the files in a folder that all ranks see; each rank reads its share of them.

    Collectives (default group): one broadcast of the names, one gather of the digests.
    """
    names = _from_rank_0(lambda: sorted(file.name for file in folder.iterdir()))
    digests = {name: _describe(folder / name) for name in _share(names)}
    files = {name: found for some in _from_all(digests) for name, found in some.items()}
    if dist.get_rank() == 0:
        write_durably(folder / NAME, json.dumps({"files": files}, indent=1))


def damage(folder: pathlib.Path) -> list[str]:
    """What is wrong with the files of a checkpoint, in words; the same list on every rank, empty when all are sound.

    Collectives (default group): one broadcast of the manifest, one gather of what was found.
    """
    files = _from_rank_0(lambda: _read(folder))
    if isinstance(files, str):
        return [files]
    found = [_compare(folder / name, files[name]) for name in _share(sorted(files))]
    return [words for some in _from_all(found) for words in some if words]


def write_durably(path: pathlib.Path, text: str) -> None:
    """Replace a small file in one step: after a crash it holds the old text or the new, on disk."""
    new = path.with_name(path.name + ".new")
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in a folder durable, as fsync does for the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: pathlib.Path) -> dict[str, dict] | str:
    try:
        return json.loads((folder / NAME).read_text())["files"]
    except FileNotFoundError:
        return f"{folder / NAME} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{folder / NAME} is no manifest"


def _compare(path: pathlib.Path, expected: dict[str, Any]) -> str:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path} has {size:,} bytes instead of {expected['bytes']:,}"
    if _describe(path) != expected:
        return f"{path} holds other bytes than were written"
    return ""


def _describe(path: pathlib.Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _from_rank_0(make: Any) -> Any:
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    return box[0]


def _from_all(thing: Any) -> list[Any]:
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, thing)
    return everything
