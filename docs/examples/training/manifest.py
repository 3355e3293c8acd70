"""The manifest of a checkpoint: size and digest of each file, written last, so that what has one is complete."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import torch.distributed as dist

NAME = "manifest.json"
LARGEST = 1 << 26  # bytes of a manifest


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

    A file that the manifest does not list is damage, too: what would be read is not what was written.

    Collectives (default group): one broadcast of the manifest, one gather of what was found.
    """
    files, wrong = _from_rank_0(lambda: _read(folder))
    found = [_compare(folder / name, files[name]) for name in _share(sorted(files))]
    return wrong + [words for some in _from_all(found) for words in some if words]


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


def _read(folder: pathlib.Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The files that a manifest lists, or none and what is wrong with it."""
    path = folder / NAME
    try:
        if path.stat().st_size > LARGEST:
            return {}, [f"{path} is no manifest: {path.stat().st_size:,} bytes"]
        files = json.loads(path.read_text())["files"]
        listed = {name: files[name] for name in files if _is_entry(name, files[name])}
        unlisted = {file.name for file in folder.iterdir()} - {*files, NAME, NAME + ".new"}
    except FileNotFoundError:
        return {}, [f"{path} is missing"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, [f"{path} is no manifest"]
    if not files or len(listed) < len(files):
        return {}, [f"{path} is no manifest: it {'has entries of another form' if files else 'lists no files'}"]
    return listed, [f"{folder / name} is not in the manifest" for name in sorted(unlisted)]


def _is_entry(name: Any, entry: Any) -> bool:
    """A name in the folder, with a size and a digest."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name
    return (
        plain and isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
    )


def _compare(path: pathlib.Path, expected: dict[str, Any]) -> str:
    try:
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} has {size:,} bytes instead of {expected['bytes']:,}"
        if _describe(path)["sha256"] != expected["sha256"]:
            return f"{path} holds other bytes than were written"
    except OSError as error:
        return f"{path} cannot be read: {error}"
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
