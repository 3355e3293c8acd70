"""What a layer of experts sends, and the rows each rank computes: am-moe's dispatchers and transformers' own.

    for n in 2 4 8; do torchrun --standalone --nproc-per-node $n docs/benchmarks/expert_bytes.py; done

Qwen3-MoE experts, 64 of them over the ranks, hidden 512, bfloat16, 2048 tokens per rank with K different experts each,
drawn at random. Bytes are those that leave a rank (its own rows do not), the mean of all ranks, counted in one run of
forward and backward; `transformers` is its all-to-all expert parallelism, which sends a token once for each expert.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from am_moe import ExpertLoad, apply_ep

TOKENS, HIDDEN, EXPERTS = 2048, 512, 64


class Counted(TorchDispatchMode):
    """The collectives that run, and the bytes that leave this rank in them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        space, _, leaf = name.partition("::")
        if space in ("am_moe", "c10d", "_c10d_functional") and leaf not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.number += 1
            self.bytes += leaving(leaf, args)
        return function(*args, **(kwargs or {}))


def leaving(name: str, args: tuple) -> int:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if name == "alltoall_base_":  # (output, input, group, output splits, input splits)
        rows, sent = args[1], args[4]
    elif name == "all_to_all":  # (input, input splits, output splits, group)
        rows, sent = args[0], args[1]
    elif name == "all_to_all_single":  # (input, output splits, input splits, group)
        rows, sent = args[0], args[2]
    elif name in ("all_gather", "counts_of_all"):  # every other rank gets what this rank has
        return args[0].nbytes * (ranks - 1)
    elif name == "reduce_scatter":  # every other rank gets its part
        return args[0].nbytes // ranks * (ranks - 1)
    else:
        raise NotImplementedError(name)
    sent = sent or [len(rows) // ranks] * ranks
    return (sum(sent) - sent[rank]) * (rows.nbytes // max(len(rows), 1))


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    if dist.get_rank() == 0 and ranks == 2:
        print("| ranks | K | by | forward, MiB | backward, MiB | collectives | rows computed per rank |")
        print("|---|---|---|---|---|---|---|")
    for choices in (2, 4, 8):
        base = 0.0
        outputs = {}
        for name in ("transformers", "all_gather", "all_to_all"):
            model = experts(choices)
            rows = spread(model, name, mesh)
            outputs[name], forward, backward = measure(model, choices)
            sizes = torch.tensor([forward.bytes, backward.bytes], dtype=torch.float64)
            dist.all_reduce(sizes)
            sent = (sizes / ranks / 2**20).tolist()
            base = base or sum(sent)
            computed = torch.tensor([float(rows())])
            dist.all_reduce(computed, dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                print(
                    f"| {ranks} | {choices} | {name} | {sent[0]:.1f} | {sent[1]:.1f} ({sum(sent) / base:.2f}x) "
                    f"| {forward.number} + {backward.number} | at most {computed.item():.0f} |",
                    flush=True,
                )
        for name, output in outputs.items():
            torch.testing.assert_close(output, outputs["transformers"], rtol=0.05, atol=0.05, msg=name)
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


def experts(choices: int) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=16, num_experts=EXPERTS, num_experts_per_tok=choices
    )
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return nn.ModuleDict({"experts": module}).to(torch.bfloat16)


def spread(model: nn.Module, name: str, mesh: DeviceMesh):
    """Spread the experts over the ranks by name; returns what tells the rows that this rank computed."""
    if name != "transformers":
        apply_ep(model, mesh["ep"], dispatcher=name)
        load = ExpertLoad(model)
        return lambda: load.computed["experts"]
    counted = []
    own = type(model["experts"]).forward

    def forward(hidden_states, top_k_index, top_k_weights):
        counted.append(top_k_index.numel())
        return own(model["experts"], hidden_states, top_k_index, top_k_weights)

    model["experts"].forward = forward
    plan = {f"experts.{name}": "grouped_gemm" for name, _ in model["experts"].named_parameters()}
    plan["experts"] = "ep_dispatch_experts"
    apply_expert_parallelism(model, mesh["ep"], mesh["tp"], plan, ep_implementation="all_to_all")
    return lambda: counted[0]


def measure(model: nn.Module, choices: int):
    generator = torch.Generator().manual_seed(dist.get_rank())
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weights, ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(choices)
    weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16).requires_grad_()
    with Counted() as forward:
        output = model["experts"](hidden, ids, weights)
    with Counted() as backward:
        output.square().mean().backward()
    return output.detach(), forward, backward


if __name__ == "__main__":
    main()
