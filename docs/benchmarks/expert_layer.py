"""One layer of experts, forward and backward: transformers' grouped kernel, am-moe's dispatchers on one rank, and the
grouped products alone, timed in turns in one run.

    python docs/benchmarks/expert_layer.py [--tokens 2048 --width 512 --inner 256 --experts 32 --choices 4 --turns 9]

On a device it computes in bfloat16, on a CPU in float32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import am_moe
from am_moe.dispatchers.all_to_all import AllToAll


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"tokens": 2048, "width": 512, "inner": 256, "experts": 32, "choices": 4, "turns": 9}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    accelerator = torch.accelerator.current_accelerator()
    device = accelerator.type if accelerator is not None else "cpu"
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    dist.init_process_group(rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("ep",))

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=args.width, moe_intermediate_size=args.inner, num_experts=args.experts, hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    plain = Qwen3MoeExperts(config).to(device, dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.02)
    spread = [am_moe.apply_ep(nn.ModuleDict({"experts": copy.deepcopy(plain)}), mesh)["experts"] for _ in range(2)]
    spread[1].spread_experts = dataclasses.replace(spread[1].spread_experts, dispatcher=AllToAll())

    x = torch.randn(args.tokens, args.width, device=device, dtype=dtype).requires_grad_()
    weights, ids = torch.rand(args.tokens, args.experts, device=device).topk(args.choices)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    ways = {
        "transformers grouped_mm": lambda: plain(x, ids, weights).backward(gradient),
        "am-moe local": lambda: spread[0](x, ids, weights).backward(gradient),
        "am-moe all_to_all, one rank": lambda: spread[1](x, ids, weights).backward(gradient),
        "the six grouped products alone": products(plain, ids, args),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns + 2):
        for name, way in ways.items():
            for tensor in (x, weights, *plain.parameters(), *spread[0].parameters(), *spread[1].parameters()):
                tensor.grad = None
            start = time.perf_counter()
            way()
            if accelerator is not None:
                torch.accelerator.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    print(f"{args}, {dtype} on {device}")
    print("| way | ms, median | of transformers' speed |\n|---|---|---|")
    first = statistics.median(seconds["transformers grouped_mm"])
    for name, times in seconds.items():
        print(f"| {name} | {1000 * statistics.median(times):.1f} | {first / statistics.median(times):.2f} |")
    dist.destroy_process_group()


def products(plain: nn.Module, ids: torch.Tensor, args: argparse.Namespace):
    counts = torch.zeros(args.experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
    ends = counts.cumsum(0).int()
    up, down = plain.gate_up_proj, plain.down_proj
    rows = torch.randn(ids.numel(), args.width, device=up.device, dtype=up.dtype).requires_grad_()
    inner = torch.randn(ids.numel(), args.inner, device=up.device, dtype=up.dtype).requires_grad_()

    def run() -> None:
        h = nn.functional.grouped_mm(rows, up.transpose(1, 2), offs=ends)
        y = nn.functional.grouped_mm(inner, down.transpose(1, 2), offs=ends)
        torch.autograd.backward([h, y], [torch.ones_like(h), torch.ones_like(y)])
        rows.grad = inner.grad = None

    return run


if __name__ == "__main__":
    main()
