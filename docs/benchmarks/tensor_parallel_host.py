"""What tensor parallelism costs the host: a training step on a mesh of one rank, which sends nothing.

    python docs/benchmarks/tensor_parallel_host.py [--compiled] [--rounds 30]

Eight tiny Llama layers, forward and backward, float32; milliseconds of CPU time, on one thread. Every round runs each
way once, so that the machine's moods meet all of them alike; the minimum of the rounds is printed. *torch's styles* is
`parallelize_module` with the plan that torch's documentation has for Llama. The last column, of a step that is not
compiled, counts the operations on DTensors beyond those that put parameters' gradients in their places (one each).
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from am_tp_plans import apply_plan, resolve_plan

LAYERS, HIDDEN, TOKENS = 8, 64, 16


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--compiled", action="store_true", help="compile every layer")
    options.add_argument("--rounds", type=int, default=30)
    asked = options.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    plain = LlamaForCausalLM(config)
    ways = {"plain": plain, "torch's styles": torchs(copy.deepcopy(plain), mesh)}
    for sequence, name in ((False, "am-tp-plans"), (True, "am-tp-plans, sequence parallelism")):
        model = copy.deepcopy(plain)
        ways[name] = apply_plan(model, mesh, resolve_plan(model, sequence_parallel=sequence))
    ids = torch.randint(0, 256, (1, TOKENS))
    dispatches = {name: dispatched(model, ids) for name, model in ways.items()}
    if asked.compiled:
        for model in ways.values():
            for layer in model.model.layers:
                layer.compile()
    best = fastest(ways, ids, asked.rounds)
    print("| way | ms a step | of plain | DTensor operations a step |")
    print("|---|---|---|---|")
    for name, seconds in best.items():
        form = "compiled layers, " if asked.compiled else ""
        print(f"| {form}{name} | {1000 * seconds:.1f} | {seconds / best['plain']:.2f}x | {dispatches[name]} |")
    dist.destroy_process_group()


def torchs(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The plan of torch's tutorial, without sequence parallelism."""
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.*.self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Replicate()},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
            use_local_output=False,
        ),
        "model.layers.*.mlp": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),), use_local_output=False
        ),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def fastest(ways: dict[str, nn.Module], ids: torch.Tensor, rounds: int) -> dict[str, float]:
    best = dict.fromkeys(ways, float("inf"))
    for index in range(rounds + 3):
        for name, model in ways.items():
            begun = time.process_time()
            step(model, ids)
            if index >= 3:
                best[name] = min(best[name], time.process_time() - begun)
            model.zero_grad()
    return best


def step(model: nn.Module, ids: torch.Tensor) -> None:
    model(ids, use_cache=False).logits.float().square().mean().backward()


class Dispatches(TorchDispatchMode):
    """Counts the operations that have a DTensor among their arguments, but for `detach`, which `.grad` is set with."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            self.number += func is not torch.ops.aten.detach.default
            return NotImplemented
        return func(*args, **(kwargs or {}))


def dispatched(model: nn.Module, ids: torch.Tensor) -> int:
    step(model, ids)
    model.zero_grad()
    with Dispatches() as counted:
        step(model, ids)
    model.zero_grad()
    return counted.number


if __name__ == "__main__":
    main()
