"""Which layout? The fastest that fit, for a model, a cluster and a batch, each with its step in parts.

    python docs/examples/plan.py path/to/folder --gpus 64 --memory 80GiB --batch-tokens 4M --seq-len 8192
    python docs/examples/plan.py --calibrate runs/machine.json

Nothing is trained and no device is needed: layers are traced on nothing, and the step is composed of what was counted
and of what the machine can do. The exit code is 0 if something fits, 2 if nothing does or the question is refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
import warnings

import torch
from planning import machine as machines
from planning.layouts import Job
from planning.machine import Machine, quantity
from planning.model import plan_for
from planning.report import as_data, nothing_fits, table
from planning.search import search


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        if args.calibrate:
            print(calibrated(args))
        return 0 if not args.model else plan(args)
    except ValueError as refusal:
        print(f"plan: {refusal}", file=sys.stderr)
        return 2


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", help="a model type of transformers, a folder with a config.json, or module:function"
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--gpus", type=int, default=8, help="ranks")
    cluster.add_argument("--gpus-per-node", type=int, help="8, or what the machine file says")
    cluster.add_argument("--memory", help="of a rank, such as 80GiB; the machine's if not given")
    cluster.add_argument("--links", help="bandwidth inside a node and across nodes, each way: 450GB/s,50GB/s")
    cluster.add_argument("--machine", default="h100", help=f"{', '.join(machines.MACHINES)}, or a file of --calibrate")
    cluster.add_argument("--calibrate", metavar="FILE", help="measure the device at hand, and write what it can do")
    step = parser.add_argument_group("step")
    step.add_argument(
        "--batch-tokens", default="1M", help="tokens of a step over all ranks; K and M are powers of 1024"
    )
    step.add_argument("--seq-len", type=int, default=4096)
    step.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="to compute in")
    step.add_argument("--kind", choices=["sft", "pretrain"], default="pretrain", help="of the main job")
    step.add_argument("--lora", type=int, default=0, help="train adapters of this rank over the frozen model")
    show = parser.add_argument_group("what is shown")
    show.add_argument("--explain", type=int, metavar="N", help="draw the step of layout N")
    show.add_argument("--picture", type=pathlib.Path, help="where to; runs/plan-N.png if not given")
    show.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(words)
    if not args.model and not args.calibrate:
        parser.error("say which model, or --calibrate FILE")
    for name in ("gpus", "seq_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def plan(args: argparse.Namespace) -> int:
    machine = machines.load(args.machine)
    if args.links:
        machine = machine.with_links(args.links)
    memory = quantity(args.memory, "--memory") if args.memory else machine.memory
    tokens = quantity(args.batch_tokens + "i" * args.batch_tokens[-1:].isalpha(), "--batch-tokens")
    if tokens < args.seq_len:
        raise ValueError(f"--batch-tokens {args.batch_tokens} is less than one sequence of --seq-len {args.seq_len}")
    per_node = args.gpus_per_node or machine.per_node
    if args.gpus > per_node and args.gpus % per_node:
        raise ValueError(f"--gpus {args.gpus} must be a multiple of --gpus-per-node {per_node}")
    job = Job(args.gpus, per_node, int(tokens) // args.seq_len, args.seq_len, args.dtype)
    planned = plan_for(args.model, args.lora)
    result = search(planned, machine, job, memory=memory)
    if not result.found:
        print(f"plan: {nothing_fits(planned, job, result, memory)}", file=sys.stderr)
        return 2
    command = f"--config {args.model}" if args.kind == "pretrain" else f"--model {args.model} --text TEXT.jsonl"
    command += f" --lora {args.lora}" * bool(args.lora)
    if args.json:
        print(json.dumps(as_data(planned, machine, job, result, command), indent=1))
    else:
        print(table(planned, machine, job, result, memory, command))
    if args.explain:
        explain(args, result.found)
    return 0


def explain(args: argparse.Namespace, found: list) -> None:
    from planning.picture import draw

    if not 1 <= args.explain <= len(found):
        raise ValueError(f"--explain {args.explain}: there are layouts 1 to {len(found)}")
    path = args.picture or pathlib.Path(f"runs/plan-{args.explain}.png")
    chosen = found[args.explain - 1]
    draw(chosen, path, str(chosen.layout))
    if not args.json:
        print(f"\nthe step of layout {args.explain} is drawn in {path}")


def calibrated(args: argparse.Namespace) -> str:
    from planning.calibrate import calibrate

    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.dtype == "bfloat16" and gpu else torch.float32
    measured: Machine = calibrate(dtype, machines.load(args.machine) if gpu else None)
    machines.save(measured, pathlib.Path(args.calibrate))
    return f"what {measured.name} can do is in {args.calibrate}; plan with --machine {args.calibrate}"


if __name__ == "__main__":
    sys.exit(main())
