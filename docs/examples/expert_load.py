"""Train a small mixture of experts over two ranks and draw how its experts' load evens out.

    torchrun --standalone --nproc-per-node 2 docs/examples/expert_load.py

A DeepSeek-V3 of four layers and eight experts on the Python standard library's source, once as it is and once with the
bias of its routers adjusted after every step (no auxiliary loss). Rank 0 writes `runs/load-plain.png` and
`runs/load-balanced.png`, the load of the last twenty steps.
"""

from __future__ import annotations

import os
import pathlib

import torch
import torch.distributed as dist

import am_moe
from training.model import build_config, build_model, next_token_loss
from training.text import ByteText

STEPS, SEQUENCES, LENGTH = 200, 8, 128


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    text = ByteText()
    for name, rate in (("plain", 0.0), ("balanced", 5e-3)):
        world, experts = am_moe.build_meshes("cpu", dp_shard=2, ep=2)
        model = build_model(build_config("deepseek_v3", 1), seed=0)
        am_moe.parallelize_model(model, world, experts, dp_axis_names=("dp_shard",), ep_axis_name="ep")
        load = am_moe.ExpertLoad(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        totals = {}
        for step in range(STEPS):
            ids, labels, _ = text.batch(2 * SEQUENCES, LENGTH, seed=0, step=step)
            mine = slice(dist.get_rank() * SEQUENCES, (dist.get_rank() + 1) * SEQUENCES)
            loss = next_token_loss(model(ids[mine], use_cache=False).logits, labels[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rate:
                load.balance(world["dp_shard"], rate=rate)
            if step >= STEPS - 20:
                for layer, counts in load.total(world["dp_shard"]).items():
                    totals[layer] = totals.get(layer, 0) + counts
            metrics = load.metrics(world["dp_shard"])
            if dist.get_rank() == 0 and step % 20 == 19:
                told = ", ".join(f"{key} {value:.2f}" for key, value in metrics.items())
                print(f"{name} step {step + 1:4d}  loss {loss.item():.3f}  {told}", flush=True)
            load.reset()
        if dist.get_rank() == 0:
            pathlib.Path("runs").mkdir(exist_ok=True)
            am_moe.plot_load(totals, f"runs/load-{name}.png", title=f"{name},", ranks=2)
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


if __name__ == "__main__":
    main()
