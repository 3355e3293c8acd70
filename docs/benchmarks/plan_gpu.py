"""The planner's step on one GPU: calibrate, then measure five settings of the main job on one rank against its plan.

    python docs/benchmarks/plan_gpu.py --out runs/plan-gpu

Writes what the card can do (`machine.json`), a table, and for each setting what its kernels took by class, for whoever
wants to know where a plan is off. Without a GPU it runs small models in float32, which shows that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from planning.calibrate import calibrate
from planning.layouts import Job, Layout
from planning.machine import Machine, load, save
from planning.model import of_model
from planning.search import Tracer, peak_of
from planning.step import Clock

import am_fsdp
from training.layout import lay_out
from training.model import build_optimizer

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 12, "num_attention_heads": 16,
         "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 8192}  # fmt: skip
EXPERTS = LLAMA | {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
                   "num_experts": 64, "num_experts_per_tok": 8}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 704, "vocab_size": 2000, "num_hidden_layers": 4, "head_dim": 16}
# name: type, sizes, sequences of a step, tokens of each, sequences of a microbatch, recomputation
SETTINGS = {
    "4 x 2048 tokens": ("llama", LLAMA, 4, 2048, 4, ""),
    "the same, recomputed": ("llama", LLAMA, 4, 2048, 4, "full"),
    "4 microbatches of 2048 tokens": ("llama", LLAMA, 4, 2048, 1, ""),
    "1 x 8192 tokens": ("llama", LLAMA, 1, 8192, 1, ""),
    "64 experts, 4 x 2048 tokens": ("qwen3_moe", EXPERTS, 4, 2048, 4, ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/plan-gpu"))
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    machine = calibrate(torch.bfloat16 if GPU else torch.float32, load("h100") if GPU else None)
    save(machine, args.out / "machine.json")
    print(f"{machine.name}, {machine.source}; calibrated in {time.perf_counter() - begun:.0f} s\n", flush=True)
    plans = {name: predicted(machine, setting) for name, setting in SETTINGS.items()}
    dist.init_process_group("nccl" if GPU else "gloo", rank=0, world_size=1, store=dist.HashStore())
    print("| setting | planned, ms | measured, ms | planned/measured | planned, MiB | measured, MiB |")
    print("|---|---|---|---|---|---|", flush=True)
    kernels = {}
    for name, setting in SETTINGS.items():
        try:
            spent, held, seen = measured(setting, args.turns)
        except torch.OutOfMemoryError as error:
            print(f"| {name} | {error} |")
            continue
        seconds, peak = plans[name]
        cells = [name, f"{1e3 * seconds:.1f}", f"{1e3 * spent:.1f}", f"{seconds / spent:.2f}", f"{peak / 2**20:,.0f}"]
        print("| " + " | ".join([*cells, f"{held / 2**20:,.0f}" if held else ""]) + " |", flush=True)
        kernels[name] = {"seconds": spent, "planned": seconds, "peak": held, "planned peak": peak, "kernels": seen}
    (args.out / "kernels.json").write_text(json.dumps(kernels, indent=1))
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
    dist.destroy_process_group()


def shape(setting: tuple) -> tuple:
    family, sizes, batch, length, microbatch, recompute = setting
    if not GPU:
        sizes, length = sizes | SMALL, length // 16
    config = AutoConfig.for_model(family, use_cache=False, **sizes)
    return config, batch, length, microbatch, recompute


def predicted(machine: Machine, setting: tuple) -> tuple[float, float]:
    """Seconds of the step and bytes of its peak."""
    config, batch, length, microbatch, recompute = shape(setting)
    with torch.device("meta"):
        planned = of_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), config.model_type)
    job = Job(1, 1, batch, length, "bfloat16" if GPU else "float32")
    layout = Layout(microbatch=microbatch, recompute=recompute)
    costs, clock = Tracer(planned, job).costs(layout), Clock(planned, machine, job)
    return clock.time(costs, layout).seconds, peak_of(clock, costs, layout).peak


def measured(setting: tuple, turns: int) -> tuple[float, int, dict[str, float]]:
    """The least seconds of a step of the main job's layout, its peak, and microseconds by kernel."""
    config, batch, length, microbatch, recompute = shape(setting)
    from training.degrees import Degrees

    degrees = Degrees()
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.model_type == "qwen3_moe":
        model.set_experts_implementation("grouped_mm")
    layout = lay_out(
        model, degrees, degrees.meshes(DEVICE.type), schedule="1F1B", microbatch=microbatch, local_batch=batch,
        device=DEVICE, mp_policy=MixedPrecisionPolicy(torch.bfloat16 if GPU else torch.float32, torch.float32),
        recompute=recompute or False,
    )  # fmt: skip
    del model
    optimizers = [build_optimizer(part, 1e-4) for part in layout.parts]
    ids = torch.randint(0, config.vocab_size, (batch, length), device=DEVICE)

    def step() -> None:
        layout.step(ids, ids)
        am_fsdp.clip_grad_norm_([n for part in layout.parts for n in part.named_parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    best = float("inf")
    for turn in range(turns + 2):
        wait()
        begun = time.perf_counter()
        step()
        wait()
        if turn >= 2:
            best = min(best, time.perf_counter() - begun)
    held = 0
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        step()
        held = torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU]) as seen:
        step()
        wait()
    times = {e.key: e.device_time_total if GPU else e.self_cpu_time_total for e in seen.key_averages()}
    largest = sorted(times.items(), key=lambda item: -item[1])[:60]
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    return best, held, {**dict(largest), "all": sum(times.values())}


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
