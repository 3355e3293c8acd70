"""Peak memory and collectives of a training step with experts over two ranks, by what is recomputed.

    torchrun --standalone --nproc-per-node 2 docs/benchmarks/expert_recomputation.py

A Qwen3-MoE of four layers (hidden 128, 16 experts, 4 of each token), fp32, 2 x 512 tokens on each rank. Bytes are those
of all tensors alive at once in forward and backward on rank 0, FLOPs those of its matrix products.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import am_moe
from am_fsdp.ledger import Ledger

LAYERS = 4
MODES = {"none": {}, "full": {"activation_checkpointing": True}}
MODES["full, routing kept"] = {"activation_checkpointing": True, "ignore_router_for_ac": True}


class Exchanges(TorchDispatchMode):
    """How many all-to-alls of the dispatcher run."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._schema.name == "am_moe::all_to_all"
        return func(*args, **(kwargs or {}))


def grouped_flops(a: torch.Size, b: torch.Size, *_args, **_kwargs) -> int:
    """Torch's counter does not know grouped products: (N, I) with (L, I, O), or (I, N) with (N, O)."""
    return 2 * a[0] * a[1] * b[-1]


def main() -> None:
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    if dist.get_rank() == 0:
        print("| recomputed | peak, MiB | | GFLOPs | | all-to-alls of a layer |\n|---|---|---|---|---|---|")
    first = None
    for name, how in MODES.items():
        world, experts = am_moe.build_meshes("cpu", dp_shard=2, ep=2)
        model = qwen3_moe()
        am_moe.parallelize_model(model, world, experts, dp_axis_names=("dp_shard",), ep_axis_name="ep", **how)
        step(model)
        ledger, exchanges = Ledger(world), Exchanges()
        ledger.hold(*(p.to_local() for p in model.parameters()))
        with ledger:
            step(model)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})
        with exchanges, counter:
            step(model)
        taken = ledger.peak, counter.get_total_flops()
        first = first or taken
        if dist.get_rank() == 0:
            cells = [f"{taken[0] / 2**20:.0f}", f"{taken[0] / first[0]:.2f}x"]
            cells += [f"{taken[1] / 1e9:.1f}", f"{taken[1] / first[1]:.2f}x", f"{exchanges.number / LAYERS:.0f}"]
            print(f"| {name} | {' | '.join(cells)} |")
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


def qwen3_moe():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def step(model):
    ids = torch.randint(0, 1024, (2, 512), generator=torch.Generator().manual_seed(dist.get_rank()))
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
