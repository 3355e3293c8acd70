"""A save that fails on one rank, before, while or after it writes, ends on all and may be repeated."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import am_fsdp.weights.hf_folder
import am_fsdp.weights.save
from am_fsdp import fsdp2_strategy_parallelize, save_hf_weights
from am_fsdp.agreement import exchange, together
from am_testkit.device import device_type
from am_testkit.exact import whole
from am_testkit.models import tiny


def laid_out():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    return fsdp2_strategy_parallelize(tiny("llama", layers=2, dtype=torch.float32), mesh, torch.float32)


def shared(path):
    paths = [str(path)]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


def failing(monkeypatch, method, error, after):
    """Let a method of the file writer fail on rank 1 at one of its calls."""
    original, calls = getattr(am_fsdp.weights.hf_folder.FileWriter, method), []

    def run(self, *arguments):
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) > after:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(am_fsdp.weights.hf_folder.FileWriter, method, run)


def unwritable_config(monkeypatch, model, folder):
    if dist.get_rank() == 1:
        model.config.odd = {object()}
    return folder


def wrong_path(value):
    return lambda monkeypatch, model, folder: value if dist.get_rank() == 1 else folder


def other_folder(monkeypatch, model, folder):
    return folder if dist.get_rank() == 0 else folder + "-elsewhere"


def fails(method, error, after):
    def prepare(monkeypatch, model, folder):
        failing(monkeypatch, method, error, after)
        return folder

    return prepare


def fails_to_rename(monkeypatch, model, folder):
    original = pathlib.Path.rename

    def rename(self, target):
        if dist.get_rank() == 1:
            raise PermissionError("not allowed")
        return original(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    return folder


def fails_at_the_index(monkeypatch, model, folder):
    original = pathlib.Path.write_text

    def write_text(self, text, *arguments, **settings):
        if self.name.endswith("index.json"):
            raise OSError("disk full")
        return original(self, text, *arguments, **settings)

    monkeypatch.setattr(pathlib.Path, "write_text", write_text)
    return folder


FAULTS = {
    "a config that JSON cannot write": (unwritable_config, "not JSON serializable"),
    "no folder": (wrong_path(None), "expected str, bytes or os.PathLike"),
    "NUL in the name": (wrong_path("a\0b"), "null byte|see different folders"),
    "ranks see other folders": (other_folder, "ranks see different folders"),
    "a file cannot be made": (fails("__init__", KeyError("gone"), 0), "KeyError: 'gone'"),
    "a write fails": (fails("write", MemoryError("no room"), 2), "MemoryError: no room"),
    "the disk is full": (fails("write", OSError(28, "No space left"), 4), "No space left"),
    "closing fails": (fails("close", RuntimeError("lost"), 0), "lost"),
    "a rename fails": (fails_to_rename, "not allowed"),
    "the index cannot be written": (fails_at_the_index, "disk full"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.ranks(2)
def test_whatever_fails_on_one_rank_ends_the_save_on_all(tmp_path, fault):
    prepare, words = FAULTS[fault]
    model = laid_out()
    folder = shared(tmp_path / "hf")
    with pytest.MonkeyPatch.context() as monkeypatch:
        given = prepare(monkeypatch, model, folder)
        with pytest.raises((ValueError, TypeError, OSError, RuntimeError), match=words):
            save_hf_weights(model, given, max_shard_size="20KB")
    dist.barrier()
    left = [path for where in (folder, folder + "-elsewhere") for path in pathlib.Path(where).glob("*")]
    assert not [path for path in left if path.suffix != ".json" or "index" in path.name], left
    if hasattr(model.config, "odd"):
        del model.config.odd
    dist.barrier()
    save_hf_weights(model, folder, max_shard_size="20KB")
    again = type(model).from_pretrained(folder)
    assert all(again.get_parameter(name).equal(whole(p)) for name, p in model.named_parameters())
    assert not [name for name in os.listdir(folder) if "part" in name or "saving" in name]


@pytest.mark.ranks(2)
def test_what_a_save_that_was_killed_left_is_no_obstacle(tmp_path):
    model = laid_out()
    folder = shared(tmp_path / "hf")
    if dist.get_rank() == 0:
        os.makedirs(folder)
        for name in ("model-00001-of-00009.safetensors.part", ".saving-0123"):
            pathlib.Path(folder, name).touch()
    dist.barrier()
    save_hf_weights(model, folder)
    assert not [name for name in os.listdir(folder) if "part" in name or "saving" in name]


@pytest.mark.ranks(2)
def test_ranks_write_side_by_side(tmp_path, monkeypatch):
    """Every rank writes its first tensor before any has written its last."""
    model = laid_out()
    folder = shared(tmp_path / "hf")
    times, write = [], am_fsdp.weights.hf_folder.FileWriter.write

    def timed(self, tensor):
        write(self, tensor)
        times.append(torch.tensor(__import__("time").monotonic(), dtype=torch.float64))

    monkeypatch.setattr(am_fsdp.weights.hf_folder.FileWriter, "write", timed)
    save_hf_weights(model, folder, max_shard_size="40KB")
    ends = torch.stack([min(times), max(times)])
    seen = [torch.empty_like(ends) for _ in range(2)]
    dist.all_gather(seen, ends)
    assert max(first for first, _ in seen) < min(last for _, last in seen)


@pytest.mark.ranks(2)
def test_texts_of_any_length_are_exchanged_and_exceptions_of_any_kind():
    mine = "x" * 5000 * dist.get_rank() + "ä"
    assert exchange(mine, None) == ["ä", "x" * 5000 + "ä"]
    for error, kind in ((KeyError("k"), RuntimeError), (PermissionError("p"), OSError), (TypeError("t"), TypeError)):

        def step(error=error):
            if dist.get_rank() == 1:
                raise error

        with pytest.raises(kind, match=error.args[0]):
            together(step, None)
    assert together(dist.get_rank, None) == dist.get_rank()
