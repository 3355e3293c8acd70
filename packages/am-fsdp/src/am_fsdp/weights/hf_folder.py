"""A Hugging Face folder of safetensors: what is in it, slices of it, new files written one tensor at a time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
from typing import Any, BinaryIO

import torch

from am_fsdp.weights.lazy import Box, Lazy

INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class HFFolder:
    """The tensors of a folder, each a `Lazy`; files are mapped while they are read and let go by `release`.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: no such folder, no safetensors in it, or an index that does not fit the files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            import safetensors
        except ImportError as error:
            raise ImportError("reading a Hugging Face folder needs safetensors: pip install am-fsdp[hf]") from error
        self._safe_open = safetensors.safe_open
        self._handles: dict[str, Any] = {}
        self._closing = contextlib.ExitStack()
        self.folder = pathlib.Path(folder)
        self.tensors: dict[str, Lazy] = {}
        for file, keys in _contents(self.folder).items():
            handle = self._handle(file)
            inside = set(handle.keys())
            absent = sorted(keys - inside) if keys is not None else []
            if absent:
                raise ValueError(f"{self.folder / INDEX} says that {file} holds {absent[0]!r}, which it does not")
            for key in sorted(inside if keys is None else keys):
                self.tensors[key] = self._tensor(file, key)
            self.release()

    def release(self) -> None:
        """Unmap the files; the next read maps again what it needs."""
        self._handles.clear()
        self._closing.close()

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            try:
                opened = self._safe_open(os.fspath(self.folder / file), framework="pt")
            except Exception as error:  # safetensors has an exception of its own for a broken file
                raise ValueError(f"{self.folder / file} is not a safetensors file: {error}") from error
            self._handles[file] = self._closing.enter_context(opened)
        return self._handles[file]

    def _tensor(self, file: str, key: str) -> Lazy:
        described = self._handle(file).get_slice(key)
        shape, name = described.get_shape(), described.get_dtype()
        if name not in _DTYPES:
            raise ValueError(f"{self.folder / file}: {key} has the dtype {name}; those that are read are {[*_DTYPES]}")

        def read(out: torch.Tensor, box: Box) -> None:
            if not out.numel():
                return
            handle = self._handle(file)
            if not box:
                out.copy_(handle.get_tensor(key))
            else:
                out.copy_(handle.get_slice(key)[tuple(slice(*ends) for ends in box)])

        return Lazy.of(shape, _DTYPES[name], read)


def _contents(folder: pathlib.Path) -> dict[str, set[str] | None]:
    """File names and the keys that the index lists for each; None where there is one file and no index."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; of weights it holds {others or 'nothing'}")
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files: dict[str, set[str] | None] = {}
        for key, file in weight_map.items():
            if pathlib.PurePath(file).is_absolute() or ".." in pathlib.PurePath(file).parts:
                raise ValueError(f"{file[:80]!r} is outside of the folder")
            files.setdefault(os.fspath(file), set()).add(key)
        if not files:
            raise ValueError("it lists no files")
        absent = sorted(file for file in files if not (folder / file).is_file())
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{folder / INDEX} is not an index of safetensors files: {_short(error)}") from error
    if absent:
        raise ValueError(f"{folder / INDEX} names {absent}, which {'are' if len(absent) > 1 else 'is'} not there")
    return files


def _short(error: Exception) -> str:
    """What is wrong with a file, which may have put all of itself into the words."""
    words = repr(error)
    return words if len(words) < 500 else f"{words[:500]}..."


class FileWriter:
    """One safetensors file, its tensors written in the order they were announced in.

    The safetensors library wants all of a file's tensors at once; its format (the length of a JSON header, the header,
    the bytes) lets one follow another.
    """

    def __init__(self, path: pathlib.Path, tensors: dict[str, Lazy]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for key, tensor in tensors.items():
            stop = start + _size(tensor)
            described = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
            header[key], start = described, stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: torch.Tensor) -> None:
        """Append a contiguous CPU tensor."""
        size = _size(tensor)
        if size:
            self._file.write(memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())))

    def close(self) -> None:
        self._file.close()


def check_dtypes(tensors: dict[str, Lazy]) -> None:
    """Refuse what the format has no name for.

    Raises:
        ValueError: names the tensor and the dtypes that there are.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{key} has the dtype {tensor.dtype}; those that are written are {[*_NAMES]}")


def files_of(parts: list[dict[str, Lazy]], limit: int) -> dict[str, dict[str, Lazy]]:
    """Split tensors over files of at most `limit` bytes (or one tensor), in order; in a file, wide dtypes first.

    No file holds tensors of two parts.
    """
    groups: list[dict[str, Lazy]] = []
    for tensors in parts:
        held = limit + 1
        for key, tensor in tensors.items():
            if held + _size(tensor) > limit:
                groups.append({})
                held = 0
            groups[-1][key] = tensor
            held += _size(tensor)
    total = len(groups)
    names = [SINGLE] if total == 1 else [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    ordered = [dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)) for group in groups]
    return dict(zip(names, ordered, strict=True))


def index_text(files: dict[str, dict[str, Lazy]]) -> dict[str, str]:
    """The name and the text of the index of a folder of several files."""
    everything = [tensor for tensors in files.values() for tensor in tensors.values()]
    index = {
        "metadata": {
            "total_size": sum(map(_size, everything)),
            "total_parameters": sum(t.numel() for t in everything),
        },
        "weight_map": {key: file for file, tensors in files.items() for key in tensors},
    }
    return {INDEX: json.dumps(index, indent=2, sort_keys=True) + "\n"}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
