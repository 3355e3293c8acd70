"""Time and extra memory of cutting a real model of 1 GiB into four stages, against nemo-automodel's splitter.

    torchrun --standalone --nproc-per-node 4 docs/benchmarks/split_memory.py

Every rank holds the whole model, as users who loaded it do, and cuts its own stage. *Extra* is the growth of the
largest rank's resident memory at its peak while cutting; *kept* is what the stage holds on to once the caller has
dropped the model. nemo-automodel is optional: without it only this package is measured.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from am_pipeline import split_model_into_stages

MIB = 2**20


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))
    splitters = {"am-pipeline": ours}
    try:
        from nemo_automodel.components.distributed.pipelining.functional import split_model_into_stages as theirs

        splitters["nemo-automodel"] = lambda model, mesh: theirs(model, mesh, "pp", "1F1B", torch.device("cpu"))
    except ImportError:
        pass
    if dist.get_rank() == 0:
        print("| splitter | model, MiB | stage, MiB | seconds | extra at peak, MiB | kept, MiB |")
        print("|---|---|---|---|---|---|")
    for name, split in splitters.items():
        row = measure(split, mesh)
        if dist.get_rank() == 0:
            print(f"| {name} | {row[0]:.0f} | {row[1]:.0f} | {row[2]:.2f} | {row[3]:.0f} | {row[4]:.0f} |")
    dist.barrier()
    os._exit(0)


def ours(model, mesh):
    return split_model_into_stages(model, mesh, "pp", "1F1B", torch.device("cpu"))


def measure(split, mesh) -> list[float]:
    """The largest value of every column over the ranks."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=20, num_attention_heads=16
    )
    torch.manual_seed(0)
    empty = resident()
    model = AutoModelForCausalLM.from_config(config)
    whole = size(model)
    before = resident()
    reset_peak()
    dist.barrier()
    began = time.perf_counter()
    stages, parts = split(model, mesh)
    seconds = time.perf_counter() - began
    extra = peak() - before
    part = size(parts[0])
    del model, stages
    row = torch.tensor([whole, part, seconds, extra, resident() - empty], dtype=torch.float64)
    dist.all_reduce(row, dist.ReduceOp.MAX)
    return row.tolist()


def size(module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / MIB


def resident() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def peak() -> float:
    return status("VmHWM")


def reset_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
