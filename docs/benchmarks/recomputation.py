"""Peak memory and time of a training step for every kind of recomputation, in one process.

    python docs/benchmarks/recomputation.py

A Llama of eight layers (hidden 256, 8 heads), fp32, 4 x 512 tokens. Bytes are those of all tensors alive at once in
forward and backward, FLOPs those of matrix products and attention, both counted as they come; seconds are medians of
rounds in which every kind takes its turn.
"""

from __future__ import annotations

import logging
import os
import statistics
import time

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from am_fsdp import fsdp2_strategy_parallelize
from am_fsdp.ledger import Ledger

MODES = {"none": False, "mlp": "mlp", "every 2nd layer": 2, "selective": "selective", "full": "full"}
ROUNDS = 7


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    models = {name: llama(mode, mesh) for name, mode in MODES.items()}
    peaks, flops = {}, {}
    for name, model in models.items():
        step(model)
        ledger = Ledger(mesh)
        ledger.hold(*(p.to_local() for p in model.parameters()))
        with ledger:
            step(model)
        peaks[name] = ledger.peak
        with FlopCounterMode(display=False) as counter:
            step(model)
        flops[name] = counter.get_total_flops()
    seconds = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            step(model)
            seconds[name].append(time.perf_counter() - started)
    first = statistics.median(seconds["none"])
    print("| recomputed | peak, MiB | | GFLOPs | | seconds | |\n|---|---|---|---|---|---|---|")
    for name in models:
        taken = statistics.median(seconds[name])
        cells = [f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks['none']:.2f}x"]
        cells += [f"{flops[name] / 1e9:.0f}", f"{flops[name] / flops['none']:.2f}x"]
        print(f"| {name} | {' | '.join(cells)} | {taken:.2f} | {taken / first:.2f}x |")
    os._exit(0)  # gloo may abort an interpreter that finalises


def llama(mode, mesh):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4000, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8
    )
    model = transformers.LlamaForCausalLM(config)
    return fsdp2_strategy_parallelize(model, mesh, torch.float32, activation_checkpointing=mode)


def step(model):
    ids = torch.arange(2048).view(4, 512)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
