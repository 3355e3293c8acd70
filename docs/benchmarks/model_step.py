"""A training step of whole models on a mesh of one rank, which sends nothing: all of the difference is the packages'.

    python docs/benchmarks/model_step.py --models narrow                       what the host costs, on any machine
    python docs/benchmarks/model_step.py --models narrow wide experts --compiled narrow wide       on a GPU

Forward, loss and backward in bfloat16 on a GPU, in float32 on a CPU. Every way of a model is run in turn, so that the
machine's moods meet all alike; the median of the turns is printed. *By hand* is `fully_shard` on each layer and the
model; *torch's styles* is `parallelize_module` with the plan of torch's documentation for Llama. Waits are the times
that a step makes the host wait for the device.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import tensor_parallel_host
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import am_fsdp
import am_moe
import am_tp_plans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
MODELS = {
    "narrow": ("Llama, 12 layers of 256", (2, 256)),
    "wide": ("Llama, 12 layers of 2048", (4, 2048)),
    "experts": ("Qwen3-MoE, 4 layers of 2048, 64 experts", (4, 2048)),
    "narrow_experts": ("Qwen3-MoE, 8 layers of 256, 16 experts", (2, 256)),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["narrow"])
    parser.add_argument("--compiled", nargs="*", choices=MODELS, default=[], help="with each layer compiled, too")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(f"{name}, torch {torch.__version__}, {DTYPE}, median of {args.turns} turns\n")
    print("| model | way | ms | of plain | MiB | waits |\n|---|---|---|---|---|---|")
    for model in args.models:
        measure(model, False, args.turns)
    for model in args.compiled:
        measure(model, True, args.turns)
    dist.destroy_process_group()


def measure(name: str, compiled: bool, turns: int) -> None:
    title, (rows, length) = MODELS[name]
    plain = build(name)
    ids = torch.randint(0, plain.config.vocab_size, (rows, length), device=DEVICE)
    position_ids = torch.arange(length, device=DEVICE).expand(rows, length)
    ways = {way: lay_out(copy.deepcopy(plain)) for way, lay_out in layouts(name, compiled).items()}
    for model in ways.values() if compiled else ():
        for layer in model.model.layers:
            layer.compile()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory = {}
    for turn in range(turns + 3):
        for way, model in ways.items():
            before = start_of_turn()
            begun = time.perf_counter()
            step(model, ids, position_ids)
            wait()
            if turn >= 3:
                seconds[way].append(time.perf_counter() - begun)
            memory[way] = torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else 0
    best = {way: statistics.median(times) for way, times in seconds.items()}
    for way, spent in best.items():
        ratio = spent / best["plain"]
        extra = f"{memory[way] / 2**20:,.0f} | {waits(ways[way], ids, position_ids)}" if DEVICE == "cuda" else " | "
        form = "compiled layers, " if compiled else ""
        print(f"| {title} | {form}{way} | {1000 * spent:.1f} | {ratio:.2f} | {extra} |", flush=True)


def build(name: str) -> nn.Module:
    wide = not name.startswith("narrow")
    sizes = {
        "hidden_size": 2048 if wide else 256,
        "intermediate_size": 5632 if wide else 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 16 if wide else 4,
        "num_key_value_heads": 8 if wide else 2,
        "vocab_size": 32000 if wide else 1024,
        "max_position_embeddings": 4096,
    }
    if name.endswith("experts"):
        sizes |= {
            "num_hidden_layers": 4 if wide else 8,
            "num_key_value_heads": 4 if wide else 2,
            "head_dim": 128 if wide else 64,
            "moe_intermediate_size": 768 if wide else 64,
            "num_experts": 64 if wide else 16,
            "num_experts_per_tok": 8 if wide else 4,
        }
    family = "qwen3_moe" if name.endswith("experts") else "llama"
    config = AutoConfig.for_model(family, use_cache=False, **sizes)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=DTYPE)
    if family == "qwen3_moe":
        model.set_experts_implementation("grouped_mm")
    return model.to(DEVICE)


def layouts(name: str, compiled: bool) -> dict[str, Callable[[nn.Module], nn.Module]]:
    if name.endswith("experts"):
        return {
            "plain": lambda model: model,
            "am-moe: experts": experts,
            "am-moe: experts, FSDP2": lambda model: experts(model, shard=True),
            "am-moe: experts, FSDP2, recomputation": lambda model: experts(model, shard=True, recompute=True),
        }
    ways = {
        "plain": lambda model: model,
        "fully_shard by hand": by_hand,
        "am-fsdp": lambda model: am_fsdp.fsdp2_strategy_parallelize(model, mesh("data_parallel"), mp_policy=POLICY),
        "torch's styles": lambda model: tensor_parallel_host.torchs(model, mesh("tp")),
        "am-tp-plans": tensor_parallel,
        "am-tp-plans, sequence parallelism": lambda model: tensor_parallel(model, sequence_parallel=True),
    }
    if compiled:  # units of FSDP2 would be compiled one by one, as they are by hand
        return {way: lay_out for way, lay_out in ways.items() if "fsdp" not in way and "fully" not in way}
    return ways | {"am-moe: context": context}


POLICY = MixedPrecisionPolicy(param_dtype=DTYPE, reduce_dtype=DTYPE)


def mesh(axis: str) -> DeviceMesh:
    return init_device_mesh(DEVICE, (1,), mesh_dim_names=(axis,))


def by_hand(model: nn.Module) -> nn.Module:
    axis = mesh("data_parallel")
    for layer in model.model.layers:
        fully_shard(layer, mesh=axis, mp_policy=POLICY)
    return fully_shard(model, mesh=axis, mp_policy=POLICY)


def tensor_parallel(model: nn.Module, **options) -> nn.Module:
    return am_tp_plans.apply_plan(model, mesh("tp"), am_tp_plans.resolve_plan(model, **options))


def context(model: nn.Module) -> nn.Module:
    am_moe.apply_cp(model, mesh("cp"))
    return model


def experts(model: nn.Module, shard: bool = False, recompute: bool = False) -> nn.Module:
    am_moe.apply_ep(model, mesh("ep"))
    if recompute:
        am_moe.apply_ac(model, ignore_router=True)
    if shard:
        am_moe.apply_fsdp(model, mesh("dp"), ep_enabled=True, ep_shard_enabled=False, mp_policy=POLICY)
    return model


def step(model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor) -> None:
    logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    for parameter in model.parameters():
        parameter.grad = None


def start_of_turn() -> int:
    wait()
    if DEVICE != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def waits(model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(model, ids, position_ids)
    return sum(event.count for event in seen.key_averages() if event.key == "cudaStreamSynchronize")


if __name__ == "__main__":
    main()
