"""The planner against steps on real ranks: seconds and peaks of twelve layouts and more of two models, on a CPU.

    torchrun --nproc-per-node 4 docs/benchmarks/plan_ranks.py --out runs/plan-ranks
    torchrun --nproc-per-node 8 docs/benchmarks/plan_ranks.py --out runs/plan-ranks
    python docs/benchmarks/plan_ranks.py --out runs/plan-ranks --draw docs/images/plan-ranks.png

The first two calibrate, lay every model out, run all layouts in turn for some rounds, and keep the least seconds of a
step, the least CPU time of all ranks in one, and the peak of the ledger of `am_fsdp` over the ranks. The last prints
the table with the rank correlations, and draws it. Where others use the cores, too, CPU time is what can be compared:
on a quiet machine a step takes that over the number of cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import sys
import time
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

from planning.calibrate import calibrate
from planning.layouts import Job, Layout
from planning.machine import Link, load, save
from planning.model import of_model
from planning.search import Tracer, peak_of
from planning.step import Clock

import am_fsdp
from am_fsdp.ledger import Ledger
from training.layout import lay_out
from training.model import build_optimizer

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 2048, "max_position_embeddings": 1024}  # fmt: skip
EXPERTS = SIZES | {"head_dim": 32, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
MODELS = {"llama": SIZES, "qwen3_moe": EXPERTS}
BATCH, SEQ_LEN = 16, 256
LAYOUTS = {
    4: {
        "llama": [
            Layout(dp_shard=4, microbatch=4),
            Layout(dp_shard=4, microbatch=1),
            Layout(dp_shard=4, microbatch=4, recompute="full"),
            Layout(dp_replicate=2, dp_shard=2, microbatch=4),
            Layout(dp_shard=2, tp=2, microbatch=4),
            Layout(dp_shard=2, tp=2, microbatch=1, recompute="full"),
            Layout(dp_shard=2, tp=2, sequence_parallel=True, microbatch=4),
            Layout(dp_shard=2, cp=2, microbatch=4),
            Layout(pp=2, dp_shard=2, microbatch=2),
            Layout(pp=4, microbatch=1),
            Layout(pp=2, tp=2, microbatch=2, recompute="full"),
            Layout(pp=2, dp_shard=2, microbatch=1, schedule="Interleaved1F1B"),
            Layout(dp_shard=1, tp=4, microbatch=2),
        ],
        "qwen3_moe": [
            Layout(dp_shard=4, microbatch=4),
            Layout(dp_shard=4, microbatch=1),
            Layout(dp_shard=4, ep=4, microbatch=4),
            Layout(dp_shard=4, ep=2, microbatch=2, recompute="full"),
            Layout(pp=2, dp_shard=2, ep=2, microbatch=2),
            Layout(dp_shard=2, cp=2, ep=4, microbatch=4),
            Layout(pp=4, microbatch=2),
        ],
    },
    8: {
        "llama": [
            Layout(dp_shard=8, microbatch=2),
            Layout(dp_replicate=2, dp_shard=4, microbatch=1, recompute="full"),
            Layout(dp_shard=4, tp=2, microbatch=2),
            Layout(pp=2, dp_shard=2, tp=2, microbatch=2),
            Layout(pp=4, dp_shard=2, microbatch=1),
            Layout(dp_shard=2, cp=2, tp=2, microbatch=4),
        ],
        "qwen3_moe": [
            Layout(dp_shard=8, ep=8, microbatch=2),
            Layout(dp_shard=8, microbatch=1),
            Layout(pp=2, dp_shard=4, ep=4, microbatch=1),
        ],
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/plan-ranks"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draw", type=pathlib.Path)
    parser.add_argument("--calibrate", action="store_true", help="and nothing else")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        print(table(rows := read(args.out)))
        if args.draw:
            draw(rows, args.draw)
        return
    torch.set_num_threads(1)
    machine = args.out / "machine.json"
    new = not machine.exists()
    if os.environ["RANK"] == "0" and new:
        save(calibrate(torch.float32), machine)  # the others wait below, and leave the cores alone
    dist.init_process_group("gloo")
    if new:
        link = measured_link()
        if dist.get_rank() == 0:
            save(replace(load(str(machine)), inside=link, across=link), machine)
    if args.calibrate:
        dist.destroy_process_group()
        return
    for name in MODELS:
        cases = LAYOUTS[dist.get_world_size()][name]
        found = measured(name, cases, args.rounds)
        if dist.get_rank() == 0:
            rows = [{"model": name, **asdict(layout), **one} for layout, one in zip(cases, found, strict=True)]
            (args.out / f"{name}-{dist.get_world_size()}.json").write_text(json.dumps(rows, indent=1))
            print("\n".join(f"{name} {c}: {1e3 * f['seconds']:.0f} ms" for c, f in zip(cases, found, strict=True)))
    dist.destroy_process_group()


def measured_link() -> Link:
    """What a sum over all ranks costs each of them in CPU time, which they share."""
    spent = []
    for numbers in (16, 2**20):
        tensor = torch.ones(numbers)
        best = float("inf")
        for _ in range(5):
            dist.barrier()
            begun = time.process_time()
            for _ in range(10):
                dist.all_reduce(tensor)
            best = min(best, over_ranks(time.process_time() - begun, dist.ReduceOp.SUM) / dist.get_world_size() / 10)
        spent.append(best)
    ranks = dist.get_world_size()
    sent = 2 * 4 * 2**20 * (ranks - 1) / ranks
    return Link(sent / (spent[1] - spent[0]), spent[0] / (1 + ranks.bit_length()))


def config_of(name: str) -> object:
    return AutoConfig.for_model(name, use_cache=False, **MODELS[name])


def measured(name: str, cases: list[Layout], rounds: int) -> list[dict[str, float]]:
    """Least seconds of a step in some rounds, CPU seconds of all ranks in it, and the largest peak of a rank."""
    steps = [build(name, layout) for layout in cases]
    best = [{"seconds": float("inf"), "cpu": float("inf"), "peak": 0.0} for _ in cases]
    for number in range(rounds + 1):
        for kept, (step, parts) in zip(best, steps, strict=True):
            if number == 0:  # makes the optimizer's state, too; and then under the ledger
                step()
                ledger = Ledger(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",)))
                ledger.hold(*held(parts))
                with ledger:
                    step()
                kept["peak"] = over_ranks(float(ledger.peak), dist.ReduceOp.MAX)
                continue
            gc.collect()
            dist.barrier()
            begun, busy = time.perf_counter(), time.process_time()
            step()
            busy = time.process_time() - busy
            dist.barrier()
            kept["seconds"] = min(kept["seconds"], time.perf_counter() - begun)
            kept["cpu"] = min(kept["cpu"], over_ranks(busy, dist.ReduceOp.SUM))
    return best


def build(name: str, layout: Layout) -> tuple:
    """A step of the main job's layout, with clipping and update, and what it trains."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    made = lay_out(
        model,
        layout,
        layout.meshes("cpu"),
        schedule=layout.schedule,
        microbatch=layout.microbatch,
        local_batch=BATCH // layout.dp,
        device=torch.device("cpu"),
        mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32),
        recompute=layout.recompute or False,
    )
    del model
    optimizers = [build_optimizer(part, 1e-4) for part in made.parts]
    ids = torch.randint(0, 2048, (BATCH // layout.dp, SEQ_LEN))
    dist.broadcast(ids, 0)

    def step() -> None:
        made.step(ids, ids)
        am_fsdp.clip_grad_norm_(
            [named for part in made.parts for named in part.named_parameters()],
            1.0,
            pipeline_shards=layout.pp,
            duplicates=made.duplicates,
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step, (made.parts, optimizers)


def held(made: tuple) -> list[torch.Tensor]:
    """Weights, buffers and the optimizer's state of a rank."""
    parts, optimizers = made
    found = [p for part in parts for p in (*part.parameters(), *part.buffers())]
    found += [
        v for o in optimizers for state in o.state.values() for v in state.values() if isinstance(v, torch.Tensor)
    ]
    return [t.to_local() if isinstance(t, DTensor) else t for t in found]


def over_ranks(number: float, how: dist.ReduceOp) -> float:
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, how)
    return float(tensor)


def read(folder: pathlib.Path) -> list[dict]:
    """What was measured, with what is planned beside it."""
    machine = load(str(folder / "machine.json"))
    rows = []
    for ranks, models in LAYOUTS.items():
        for name in models:
            file = folder / f"{name}-{ranks}.json"
            job = Job(ranks, ranks, BATCH, SEQ_LEN, "float32")
            with torch.device("meta"):
                planned = of_model(AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32), name)
            tracer, clock = Tracer(planned, job), Clock(planned, machine, job)
            for row in json.loads(file.read_text()) if file.exists() else []:
                kept = {key: row.pop(key) for key in ("model", "seconds", "cpu", "peak")}
                layout = Layout(**row)
                costs = tracer.costs(layout)
                time_ = clock.time(costs, layout)
                peak = peak_of(clock, costs, layout).peak
                rows.append(
                    {**kept, "ranks": ranks, "layout": str(layout), "planned": time_.seconds, "planned peak": peak}
                )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| model | ranks | layout | planned, ms | measured | CPU of all ranks | planned peak, MiB | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        times = f"{1e3 * r['planned']:.0f} | {1e3 * r['seconds']:.0f} | {1e3 * r['cpu']:.0f}"
        peaks = f"{r['planned peak'] / 2**20:.1f} | {r['peak'] / 2**20:.1f} ({r['planned peak'] / r['peak'] - 1:+.1%})"
        lines.append(f"| {r['model']} | {r['ranks']} | {r['layout']} | {times} | {peaks} |")
    lines.append("")
    for name, ranks in dict.fromkeys((r["model"], r["ranks"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["ranks"]) == (name, ranks)]
        lines.append(f"{name}, {ranks} ranks: {correlations(mine)}")
    worst = max(abs(r["planned peak"] / r["peak"] - 1) for r in rows)
    near = sum(abs(r["planned peak"] / r["peak"] - 1) <= 0.1 for r in rows)
    lines.append(f"all {len(rows)}: {correlations(rows)}; {near} peaks within 10 %, the worst {worst:.1%}")
    return "\n".join(lines)


def correlations(rows: list[dict]) -> str:
    cpu, seconds = correlation(rows, "cpu"), correlation(rows, "seconds")
    return f"rank correlation {cpu:.2f} with CPU time, {seconds:.2f} with seconds"


def correlation(rows: list[dict], measured: str) -> float:
    """Spearman's, with planned seconds."""

    def ranks(key: str) -> torch.Tensor:
        return torch.tensor([r[key] for r in rows]).argsort().argsort().double()

    return float(torch.corrcoef(torch.stack([ranks("planned"), ranks(measured)]))[0, 1])


def draw(rows: list[dict], path: pathlib.Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    for axes, key, planned, unit in zip(
        figure.subplots(1, 2), ("cpu", "peak"), ("planned", "planned peak"), (1e3, 2**-20), strict=True
    ):
        for name, ranks in dict.fromkeys((r["model"], r["ranks"]) for r in rows):
            mine = [r for r in rows if (r["model"], r["ranks"]) == (name, ranks)]
            axes.scatter(
                [r[key] * unit for r in mine], [r[planned] * unit for r in mine], label=f"{name}, {ranks} ranks"
            )
        largest = max(max(r[key], r[planned]) * unit for r in rows)
        axes.plot([0, largest], [0, largest], color="grey", lw=0.8)
        axes.set_xlabel(f"measured, {'ms of CPU a step, all ranks' if key == 'cpu' else 'MiB at the peak'}")
        axes.set_ylabel("planned, ms" if key == "cpu" else "planned, MiB")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
