"""A model that is laid out over ranks, written as a Hugging Face folder: ranks gather together and write side by side.

gather     one tensor at a time, all ranks; the rank that writes its file keeps it, the others drop it
files      rank r writes files r, r + n, ... of n ranks; tensors of n files take turns, so that n ranks write at once
names      files have their names, and the folder its index and configs, when all of them are written

model-00001-of-00003.safetensors   rank 0   a c e ...
model-00002-of-00003.safetensors   rank 1    b d f ...
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import pathlib
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from am_fsdp.agreement import exchange, rank_in, together
from am_fsdp.layout.packed import packed_weights
from am_fsdp.weights.adapters import Adapters, adapter_of, adapter_tensors, base_model, merged_tensors
from am_fsdp.weights.hf_folder import ADAPTER, FileWriter, check_dtypes, files_of, index_text
from am_fsdp.weights.hf_names import folder_tensors, named_tensors, of_transformers, own_classes, some, tied_sources
from am_fsdp.weights.lazy import Box, Lazy

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}
_WEIGHTS = re.compile(r"(pytorch_model|model|adapter_model).*\.(safetensors|bin|json)")
_UNFINISHED = ".part"  # of a file's name until all are written


@torch.no_grad()
def save_hf_weights(
    model: nn.Module | Sequence[nn.Module],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    group: dist.ProcessGroup | None = None,
    adapters: Literal["base", "adapter", "merged"] | None = None,
    pipeline_parts: bool = False,
) -> None:
    """Write a model that is laid out over ranks as a folder that `from_pretrained` loads.

    Keys are those that `save_pretrained` writes: experts one key each where transformers does so, tied weights once;
    the configs of a transformers model lie beside them. One tensor of the model is gathered at a time; ranks write
    files side by side, and each holds two tensors of the folder at most. Files get their names when all are written,
    and what a failed save wrote is removed, so that it may be repeated.

    Args:
        model: the whole model on every rank of `group`, in any layout. Parameters without a mesh must be the same on
            every rank. With `pipeline_parts`, the part that this rank holds, or a list of them.
        folder: made if absent; must not hold weights already; every rank sees it.
        max_shard_size: of a file, in bytes or as "500MB"; a larger tensor has a file of its own.
        dtype: to write floating-point parameters in; None for theirs.
        group: all ranks that hold the model; the default group if None, one process where there is none.
        adapters: of a model with peft's adapters what to write, which then must be said: "base" for the base model
            without them; "adapter" for the active one, in peft's own format, which `PeftModel.from_pretrained` loads;
            "merged" for the base model with the active one in it.
        pipeline_parts: the ranks of `group` hold the parts of one model, together all of it. Those with the same part
            write its files.

    Collectives: over `group` a few exchanges of short messages; per parameter an all-gather over each axis that shards
        it.

    Raises:
        ValueError: the folder holds weights, or ranks see different ones; `max_shard_size` is no size; a parameter is
            on meta or a partial sum; the ranks hold different models, or with `pipeline_parts` not all of one; this
            rank is not in `group`; transformers cannot revert a conversion; the model has adapters and `adapters` does
            not say what to write, or asks for what they are not. On every rank alike, before anything is written.
        OSError, RuntimeError: a rank failed, with its message; on every rank alike, and what was written is removed.
    """
    rank = rank_in(group)
    if rank < 0:
        raise ValueError("this rank is not in group; only ranks that hold the model and are in it save")
    parts = list(model) if isinstance(model, (list, tuple)) else [model]
    plan = together(lambda: _plan(parts, folder, max_shard_size, dtype, adapters, pipeline_parts), group)
    alike = _ranks_alike(plan, exchange(plan.digest(), group), rank, group, pipeline_parts, adapters)
    with _one_folder(plan.target, rank, group):
        mine = [file for number, file in enumerate(plan.files) if number % len(alike) == alike.index(rank)]
        written = [plan.target / f"{file}{_UNFINISHED}" for file in mine]
        try:
            _write(plan, mine, len(alike), group)
            if plan.pieces:
                mine = [ADAPTER] if rank == 0 else []
                together(lambda: _join(plan, written) if rank == 0 else None, group)
            together(lambda: _name_files(plan.target, mine, written), group)
            together(lambda: _write_texts(plan, written) if rank == 0 else None, group)
        except BaseException:
            for path in written:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise


@dataclass
class _Plan:
    """All that is written, and what of the model each tensor of it needs."""

    target: pathlib.Path
    limit: int
    kind: str  # the model's class, for errors
    tensors: dict[str, torch.Tensor]
    held: dict[str, Lazy]  # the folder's, by key
    needs: dict[str, list[str]]  # names of the model's, by key
    gathered: dict[str, torch.Tensor]  # what a tensor of the folder reads from
    texts: dict[str, str]
    expected: set[str]  # keys of the whole model, of which this may be a part
    files: dict[str, dict[str, Lazy]] = field(default_factory=dict)  # those that ranks with the same tensors write
    pieces: list[str] = field(default_factory=list)  # files of parts, of which one is made in the end

    def described(self) -> str:
        return json.dumps({key: [str(t.dtype).partition(".")[2], [*t.shape]] for key, t in self.held.items()})

    def digest(self) -> str:
        return hashlib.sha256(f"{self.limit} {self.described()}".encode()).hexdigest()


def _plan(
    parts: list[Any], folder: Any, limit: int | str, dtype: torch.dtype | None, adapters: str | None, are_parts: bool
) -> _Plan:
    target, size = pathlib.Path(folder), _bytes(limit)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    if not parts or (len(parts) > 1 and not are_parts):
        raise ValueError(f"model must be one module, or a list of parts with pipeline_parts=True; got {len(parts)}")
    plan = _Plan(target, size, type(parts[0]).__name__, {}, {}, {}, {}, {}, set())
    touched: list[str] = []
    for number, model in enumerate(parts):
        base = base_model(model)
        tensors = named_tensors(base)
        _check(target, tensors)
        leaves = _leaves(_once(base, tensors), f"{number} ", touched, plan.gathered)
        plan.tensors |= {f"{number} {name}": tensor for name, tensor in tensors.items()}
        held = _folder_tensors(model, base, tensors, leaves, dtype, adapters)
        plan.held |= {key: lazy for key, lazy in held.items() if key not in plan.held}
    check_dtypes(plan.held)
    for key, lazy in plan.held.items():
        touched.clear()
        lazy.fill(torch.empty(lazy.shape, dtype=lazy.dtype, device="meta"))
        plan.needs[key] = list(dict.fromkeys(touched))
    base = base_model(parts[0])
    plan.texts = _texts_of(base.peft_config[adapter_of(base)], "peft") if adapters == "adapter" else _texts(base, dtype)
    if are_parts and adapters != "adapter" and of_transformers(base):
        plan.expected = _keys_of_whole(base)
    return plan


def _once(base: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied weights under the name that the others are tied to."""
    ties, plain = tied_sources(base), Adapters.of(base, list(tensors)).base
    once = {id(tensors[name]): name for name in sorted(tensors, key=lambda n: plain.get(n, n) not in ties)}
    return {name: tensor for name, tensor in tensors.items() if once[id(tensor)] == name}


def _folder_tensors(
    model: Any,
    base: Any,
    tensors: dict[str, torch.Tensor],
    leaves: dict[str, Lazy],
    dtype: torch.dtype | None,
    adapters: str | None,
) -> dict[str, Lazy]:
    found = Adapters.of(base, list(tensors))
    _check_adapters(model, found, adapters)
    if adapters == "adapter":
        held = adapter_tensors(found, leaves, adapter_of(base))
        return {key: _in_dtype(lazy, dtype) for key, lazy in held.items()}
    if packed := packed_weights(base):
        raise ValueError(
            f"{next(iter(packed))} is packed (quantised), and its scales have no place in a "
            'folder of weights; adapters="adapter" writes the adapter alone'
        )
    if adapters == "merged":
        _check_untied(found, tensors)
        plain = merged_tensors(base, found, leaves, adapter_of(base))
    else:
        plain = {found.base[name]: lazy for name, lazy in leaves.items() if name in found.base}
    parameters = {found.base.get(name, name) for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    plain = {name: _in_dtype(lazy, dtype) if name in parameters else lazy for name, lazy in plain.items()}
    return folder_tensors(base, plain)


def _keys_of_whole(part: Any) -> set[str]:
    """The keys of a folder of the model that a transformers module is a part of."""
    kind = next(c for c in type(part).__mro__ if not issubclass(c, FSDPModule))
    with torch.device("meta"):
        whole: Any = kind._from_config(copy.deepcopy(part.config))  # type: ignore[attr-defined]
    tensors = named_tensors(whole)
    return set(folder_tensors(whole, _leaves(_once(whole, tensors), "", [], {})))


def _ranks_alike(
    plan: _Plan,
    digests: list[str],
    rank: int,
    group: dist.ProcessGroup | None,
    are_parts: bool,
    adapters: str | None,
) -> list[int]:
    """Set the files that the ranks with the same tensors write; returns those ranks.

    Raises:
        ValueError: ranks hold different tensors, or with parts not all of a model; on every rank alike.
    """
    alike = [other for other, digest in enumerate(digests) if digest == digests[rank]]
    if not are_parts and len(alike) < len(digests):
        raise ValueError(
            f"the ranks of the group hold different tensors of {plan.kind}, as pipeline parts do, or were given "
            "different arguments; every rank must hold the whole model. Pass as group the ranks that hold the same, or "
            "pipeline_parts=True where they hold the parts of one model"
        )
    stages = [plan.held]
    if len(alike) < len(digests):
        first = rank == alike[0]
        stages, known = [], set()
        for other, text in enumerate(exchange(plan.described() if first else "", group)):
            if not text:
                continue
            mine = digests[other] == digests[rank]
            tensors = plan.held if mine else {key: _foreign(*form) for key, form in json.loads(text).items()}
            stages.append({key: lazy for key, lazy in tensors.items() if key not in known})
            known |= set(tensors)
    everything = {key for tensors in stages for key in tensors}
    together(lambda: _refuse_incomplete(plan, everything), group)
    limit = plan.limit if adapters != "adapter" else 1 << 62
    files = files_of(stages, limit)
    if adapters == "adapter":
        stem = ADAPTER.removesuffix(".safetensors")
        if len(stages) > 1:  # peft reads one file
            files = {f"{stem}-{number}.safetensors": inside for number, inside in enumerate(files.values(), 1)}
            plan.pieces = list(files)
        else:
            files = {ADAPTER: next(iter(files.values()))}
    elif len(files) > 1:
        plan.texts |= index_text(files)
    held = plan.held
    plan.files = {
        file: inside for file, inside in files.items() if all(held.get(k) is lazy for k, lazy in inside.items())
    }
    return alike


def _foreign(dtype: str, shape: list[int]) -> Lazy:
    """A tensor of another rank's part, which is never read here."""

    def read(_out: torch.Tensor, _box: Box) -> None:
        raise RuntimeError("this tensor is in another part of the model")

    return Lazy.of(shape, getattr(torch, dtype), read)


def _refuse_incomplete(plan: _Plan, everything: set[str]) -> None:
    missing = plan.expected - everything
    if missing:
        raise ValueError(f"the parts on the ranks of the group lack {some(missing)} of {plan.kind}; give all parts")


def _bytes(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B|)", size.strip().upper())
        size = int(float(match[1]) * _UNITS[match[2]]) if match else -1
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError("max_shard_size must be a positive number of bytes, or a size such as '5GB' or '500MB'")
    return size


def _check(target: pathlib.Path, tensors: dict[str, torch.Tensor]) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is not a folder")
    present = sorted(p.name for p in target.glob("*") if _WEIGHTS.fullmatch(p.name))
    if present:
        raise ValueError(f"{target} holds weights already ({some(present)}); save to another folder or delete them")
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"there is nothing to save in tensors on the meta device: {some(empty)}")
    sums = [n for n, t in tensors.items() if isinstance(t, DTensor) and any(p.is_partial() for p in t.placements)]
    if sums:
        raise ValueError(f"partial sums cannot be saved: {some(sums)}")


def _check_adapters(model: nn.Module, found: Adapters, adapters: str | None) -> None:
    kinds = ("base", "adapter", "merged")
    if adapters is not None and adapters not in kinds:
        raise ValueError(f"adapters must be one of {kinds} or None, got {adapters!r}")
    if found and adapters is None:
        raise ValueError(
            f"{type(model).__name__} has adapters ({some(found.trained)}); say what to write: adapters='base', "
            "'adapter' or 'merged'"
        )
    merged = [name for name, layer in found.layers.items() if getattr(layer, "merged", False)]
    if merged:
        raise ValueError(f"an adapter is merged into the base weights of {some(merged)}; undo that before saving")
    if not found and adapters in ("adapter", "merged"):
        raise ValueError(f"adapters={adapters!r}, but {type(model).__name__} has none")


def _check_untied(found: Adapters, tensors: dict[str, torch.Tensor]) -> None:
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = names.setdefault(id(tensor), name)
        if first != name and any(each.startswith(f"{layer}.") for layer in found.layers for each in (first, name)):
            raise ValueError(
                f"{first} and {name} are one weight, and an adapter is on one of them; save 'adapter' instead"
            )


def _leaves(
    tensors: dict[str, torch.Tensor], prefix: str, touched: list[str], gathered: dict[str, torch.Tensor]
) -> dict[str, Lazy]:
    """The model's tensors as something to read from, once they are gathered; reads into meta tell what is needed."""

    def leaf(name: str, tensor: torch.Tensor) -> Lazy:
        def read(out: torch.Tensor, box: Box) -> None:
            if out.is_meta:
                touched.append(name)
            else:
                out.copy_(gathered[name][tuple(slice(*ends) for ends in box)])

        return Lazy.of(tensor.shape, tensor.dtype, read)

    return {name: leaf(prefix + name, tensor) for name, tensor in tensors.items()}


def _in_dtype(lazy: Lazy, dtype: torch.dtype | None) -> Lazy:
    """Converted as it is read."""
    if dtype is None or not lazy.is_floating_point():
        return lazy
    return Lazy.of(lazy.shape, dtype, lazy.read_into)


def _texts(model: Any, dtype: torch.dtype | None) -> dict[str, str]:
    """The configs of a transformers model, as they will lie in the folder; written before any weight is."""
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    if not hasattr(config, "save_pretrained"):
        return {}
    config = copy.deepcopy(config)
    config.dtype = dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    with own_classes(model):
        config.architectures = [type(model).__name__]
    return _texts_of(config, "config") | (_texts_of(generation, "config") if generation is not None else {})


def _texts_of(config: Any, kind: str) -> dict[str, str]:
    if kind == "peft":
        config = copy.copy(config)
        config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return {path.name: path.read_text() for path in sorted(pathlib.Path(folder).iterdir())}


@contextlib.contextmanager
def _one_folder(target: pathlib.Path, rank: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """A folder that every rank sees, shown by a file that rank 0 puts there; what a save that was killed left goes.

    Raises:
        ValueError: a rank does not see it.
    """
    made = rank == 0 and not target.exists()
    mark = exchange(f".saving-{secrets.token_hex(8)}" if rank == 0 else "", group)[0]

    def begin() -> None:
        if rank == 0:
            target.mkdir(parents=True, exist_ok=True)
            for left in [*target.glob(".saving-*"), *target.glob(f"*.safetensors{_UNFINISHED}")]:
                left.unlink()
            (target / mark).touch()

    def look() -> None:
        if not target.is_dir() or mark not in os.listdir(target):
            raise ValueError(f"ranks see different folders under {target}; save where all of them see the same files")

    try:
        together(begin, group)
        together(look, group)
        yield
        together(lambda: (target / mark).unlink() if rank == 0 else None, group)
    except BaseException:
        with contextlib.suppress(OSError):
            (target / mark).unlink(missing_ok=True)
            if made:
                target.rmdir()  # if nothing else is there
        raise


def _write(plan: _Plan, mine: list[str], ranks: int, group: dist.ProcessGroup | None) -> None:
    """Write this rank's files and take part in gathering for the others'."""
    failures: list[Exception] = []
    with ThreadPoolExecutor(1) as writing:
        everything = list(plan.files.items())
        for start in range(0, len(everything), ranks):
            abreast = dict(everything[start : start + ranks])
            writers = {file: _Writer(plan, file, writing, failures) for file in abreast if file in mine}
            held: dict[str, list[str]] = {file: [] for file in abreast}
            for turn in itertools.zip_longest(*abreast.values()):
                for file, key in zip(abreast, turn, strict=True):
                    if key is None:
                        continue
                    for name in plan.needs[key]:
                        if name not in held[file]:
                            whole = _whole(plan.tensors[name])
                            if file in writers:
                                plan.gathered[name] = whole
                            del whole
                    held[file] = plan.needs[key]
                    if file in writers:
                        writers[file].write(key)
            for writer in writers.values():
                writer.close()
            plan.gathered.clear()
    together(lambda: _raise_first(failures), group)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    mesh, local = tensor.device_mesh, tensor.to_local()
    if local.device.type != mesh.device_type:  # offloaded; the mesh's groups may know nothing of the CPU
        local = local.to(mesh.device_type)
        shape, stride = tensor.shape, tensor.stride()
        tensor = DTensor.from_local(local, mesh, tensor.placements, run_check=False, shape=shape, stride=stride)
    return tensor.full_tensor()


class _Writer:
    """One file: tensors are made as they are asked for and written in the background, one behind the other.

    What goes wrong is noted and not raised: the other ranks wait for this one in the next gather.
    """

    def __init__(self, plan: _Plan, file: str, writing: ThreadPoolExecutor, failures: list[Exception]) -> None:
        self._plan, self._tensors, self._writing, self._failures = plan, plan.files[file], writing, failures
        self._pending: Future[None] | None = None
        self._file: FileWriter | None = None
        self._unless_failed(lambda: self._open(plan.target / f"{file}{_UNFINISHED}"))

    def write(self, key: str) -> None:
        self._unless_failed(lambda: self._write(key))
        for name in [name for name in self._plan.gathered if name not in self._plan.needs[key]]:
            del self._plan.gathered[name]

    def close(self) -> None:
        self._unless_failed(self._wait)
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except Exception as error:
                self._failures.append(error)

    def _open(self, path: pathlib.Path) -> None:
        self._file = FileWriter(path, self._tensors)

    def _write(self, key: str) -> None:
        lazy = self._tensors[key]
        made = lazy.fill(torch.empty(lazy.shape, dtype=lazy.dtype))
        self._wait()
        if self._file is not None:
            self._pending = self._writing.submit(self._file.write, made)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _unless_failed(self, step: Callable[[], None]) -> None:
        if not self._failures:
            try:
                step()
            except Exception as error:
                self._failures.append(error)


def _raise_first(failures: list[Exception]) -> None:
    if failures:
        raise failures[0]


def _join(plan: _Plan, written: list[pathlib.Path]) -> None:
    """One file of those that the ranks wrote, which go; all of it is in memory, and adapters are small."""
    from safetensors.torch import load_file, save_file

    paths = [plan.target / f"{piece}{_UNFINISHED}" for piece in plan.pieces]
    tensors = {key: tensor for path in paths for key, tensor in load_file(path).items()}
    whole = plan.target / f"{ADAPTER}{_UNFINISHED}"
    written.append(whole)
    save_file(tensors, whole, metadata={"format": "pt"})
    for path in paths:
        path.unlink()


def _name_files(target: pathlib.Path, files: list[str], written: list[pathlib.Path]) -> None:
    for file in files:
        if (target / file).exists():
            raise ValueError(f"{target / file} appeared while it was written; save to another folder")
        (target / f"{file}{_UNFINISHED}").rename(target / file)
        written.append(target / file)


def _write_texts(plan: _Plan, written: list[pathlib.Path]) -> None:
    for name, text in plan.texts.items():
        if not (plan.target / name).exists():
            written.append(plan.target / name)
        (plan.target / name).write_text(text)
