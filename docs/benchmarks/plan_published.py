"""The planner against published steps: torchtitan's Llama 3.1 on H100, which this project has not run.

    python docs/benchmarks/plan_published.py

Source: github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (December 2024). The planner knows
neither compilation, nor float8, nor asynchronous tensor parallelism: rows with those show what the plan is without.
"""

from __future__ import annotations

import pathlib
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from planning.costs import count_costs
from planning.layouts import Job, Layout
from planning.machine import load
from planning.model import of_model
from planning.search import peak_of
from planning.step import Clock

EIGHT = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
SHARED = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "use_cache": False}
SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full"}
PIPELINE = {"pp": 8, "dp_shard": 8, "tp": 8, "sequence_parallel": True}
# what, sizes, ranks, sequences, layout, tokens per second and GPU, GiB
ROWS = [
    ("8B, FSDP", EIGHT, 8, 16, Layout(dp_shard=8, microbatch=2, **SELECTIVE), 5762, 82.4),
    ("8B, FSDP, compiled", EIGHT, 8, 16, Layout(dp_shard=8, microbatch=2, **SELECTIVE), 6667, 77.0),
    ("8B, FSDP", EIGHT, 128, 256, Layout(dp_shard=128, microbatch=2, **SELECTIVE), 5605, 67.0),
    ("405B, 1F1B, compiled, float8, async TP", LARGE, 512, 256, Layout(**PIPELINE, **FULL), 100, 82.5),
    (
        "405B, interleaved, compiled, float8, async TP",
        LARGE,
        512,
        256,
        Layout(**PIPELINE, **FULL, schedule="Interleaved1F1B"),
        128,
        72.7,
    ),
]


def main() -> None:
    machine = load("h100-500w")
    print("| published | GPUs | tokens/s and GPU | planned | planned/published | GiB | planned |")
    print("|---|---|---|---|---|---|---|")
    known: dict[tuple, tuple] = {}
    for what, sizes, ranks, batch, layout, rate, memory in ROWS:
        job = Job(ranks, 8, batch, 8192)
        key = (sizes["hidden_size"], layout.tp, layout.recompute)
        if key not in known:
            with torch.device("meta"):
                config = AutoConfig.for_model("llama", **sizes, **SHARED)
                planned = of_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), what)
            shape = {"tp": layout.tp, "sequence_parallel": layout.sequence_parallel, "recompute": layout.recompute}
            known[key] = planned, count_costs(planned, seq_len=8192, **shape)
        planned, costs = known[key]
        clock = Clock(planned, machine, job)
        told = job.tokens / clock.time(costs, layout).seconds / ranks
        peak = peak_of(clock, costs, layout).peak / 2**30
        print(f"| {what} | {ranks} | {rate:,} | {told:,.0f} | {told / rate:.2f} | {memory} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
