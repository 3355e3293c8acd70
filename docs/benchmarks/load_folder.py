"""Memory of reading a folder of about 1 GB into a model on four ranks, against `from_pretrained` and sharding.

    torchrun --standalone --nproc-per-node 4 docs/benchmarks/load_folder.py

*Peak* is the growth of the largest rank's anonymous memory (`RssAnon`; mapped files are page cache that ranks share),
sampled every 2 ms; *resident* is the growth of its `VmHWM`, mapped pages included.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import tempfile
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from am_fsdp import fsdp2_strategy_parallelize, load_hf_weights

MIB = 2**20
CONFIG = LlamaConfig(
    vocab_size=16384, hidden_size=1024, intermediate_size=2816, num_hidden_layers=17, num_attention_heads=16
)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    with tempfile.TemporaryDirectory() as folder:
        paths = [folder]
        dist.broadcast_object_list(paths, src=0)
        if dist.get_rank() == 0:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder, max_shard_size="200MB")
            gc.collect()
            print("| by | folder, MiB | shard, MiB | largest tensor, MiB | peak, MiB | resident, MiB | seconds |")
            print("|---|---|---|---|---|---|---|")
        dist.barrier()
        for name, load in {"load_hf_weights": read_shards, "from_pretrained, then fully_shard": read_whole}.items():
            row = measure(load, paths[0], mesh)
            if dist.get_rank() == 0:
                print(
                    f"| {name} | " + " | ".join(f"{value:.0f}" for value in row[:5]) + f" | {row[5]:.1f} |", flush=True
                )
        dist.barrier()
    dist.destroy_process_group()


def read_shards(folder, mesh):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG)
    return load_hf_weights(fsdp2_strategy_parallelize(model, mesh, torch.float32), folder)


def read_whole(folder, mesh):
    return fsdp2_strategy_parallelize(AutoModelForCausalLM.from_pretrained(folder), mesh, torch.float32)


def measure(load, folder, mesh) -> list[float]:
    """The largest value of every column over the ranks."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, resident = status("RssAnon"), status("VmRSS")
    highest, done = [before], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], status("RssAnon"))

    thread = threading.Thread(target=sample)
    thread.start()
    dist.barrier()
    began = time.perf_counter()
    model = load(folder, mesh)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    sizes = [p.numel() * p.element_size() / MIB for p in parameters]
    shard = sum(p.to_local().numel() * p.element_size() for p in parameters) / MIB
    row = [sum(sizes), shard, max(sizes), highest[0] - before, status("VmHWM") - resident, seconds]
    values = torch.tensor(row, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def status(name: str) -> float:
    with open(f"/proc/{os.getpid()}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
