"""Messages and seconds of a pipeline's first step: static shapes against the ones that torch infers by sending them.

    torchrun --standalone --nproc-per-node 4 docs/benchmarks/first_step.py

Both run the same parts of the same model under torch's 1F1B. *inferred* is torch's own `PipelineStage` and schedule,
which sends pickled metadata from stage to stage and runs a forward and a backward for it; *static* is this package's.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from am_pipeline import pipeline_model

ROUNDS = 5


class Messages(TorchDispatchMode):
    """How often this rank sent, or took part in a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.count += name.startswith("c10d::") and not name.startswith(("c10d::recv", "c10d::barrier"))
        return function(*args, **(kwargs or {}))


def loss_fn(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def main() -> None:
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("pp",))
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=16, num_attention_heads=4
    )
    results: dict[str, list[tuple[int, float, int, float]]] = {"inferred": [], "static": []}
    for _ in range(ROUNDS):
        for kind, rows in results.items():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            schedule, parts, first, last, _ = pipeline_model(
                model,
                mesh,
                None,
                pp_axis_name="pp",
                dp_axis_names=(),
                layers_per_stage=None,
                pipeline_parallel_schedule_csv=None,
                pipeline_parallel_schedule="1F1B",
                microbatch_size=1,
                local_batch_size=2 * ranks,
                device=torch.device("cpu"),
                loss_fn=loss_fn,
            )
            if kind == "inferred":
                stage = PipelineStage(parts[0], rank, ranks, torch.device("cpu"))
                schedule = Schedule1F1B(stage, 2 * ranks, loss_fn)
            ids = torch.randint(0, 512, (2 * ranks, 64))
            rows.append((*step(schedule, ids, first, last), *step(schedule, ids, first, last)))
    if rank == 0:
        report(ranks, results)
    dist.barrier()
    os._exit(0)


def step(schedule, ids, first, last) -> tuple[int, float]:
    """Messages of all ranks in one step, and its seconds on the slowest."""
    dist.barrier()
    began = time.perf_counter()
    with Messages() as messages:
        schedule.step(*((ids,) if first else ()), target=ids if last else None)
    seconds = torch.tensor(time.perf_counter() - began)
    count = torch.tensor(messages.count)
    dist.all_reduce(count)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return int(count), float(seconds)


def report(ranks: int, results: dict[str, list[tuple[int, float, int, float]]]) -> None:
    print("| ranks | shapes | messages, first step | messages, second step | seconds, first step (median) |")
    print("|---|---|---|---|---|")
    medians = {kind: sorted(row[1] for row in rows)[len(rows) // 2] for kind, rows in results.items()}
    for kind, rows in results.items():
        ratio = medians[kind] / medians["inferred"]
        print(f"| {ranks} | {kind} | {rows[0][0]} | {rows[0][2]} | {medians[kind]:.3f} ({ratio:.2f}x) |")


if __name__ == "__main__":
    main()
