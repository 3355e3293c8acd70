"""What every rank does: measure the layout under each condition, agree on what was found, and print it once."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from training.degrees import Degrees
from verifying.compare import compare
from verifying.conditions import Condition
from verifying.report import Result, agree, exit_code, table


def verify(args: argparse.Namespace) -> int:
    """The exit code of all ranks.

    Args:
        args: of `verify.parse_arguments`.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = join()
    store = dist.PrefixStore("verify", dist.distributed_c10d._get_default_store().clone())
    results = []
    for number, condition in enumerate(args.conditions):
        result = agree(measure(args, condition, device), number, store, rank, world_size)
        results.append(result)
        if result.broke:  # ranks may still wait for each other
            break
    if rank == results[-1].speaker:
        print(title(args), table(results), sep="\n\n", flush=True)
    store.set(f"done {rank}", "")
    for other in range(world_size if not results[-1].broke else 0):
        store.wait([f"done {other}"])
    return exit_code(results)


def measure(args: argparse.Namespace, condition: Condition, device: torch.device) -> Result:
    try:
        errors = compare(
            args.subject,
            condition,
            degrees_of(args),
            schedule=args.schedule,
            microbatch=args.microbatch,
            sequences=args.batch,
            length=args.seq_len,
            device=device,
            recompute=args.recompute,
            compile_with=args.compile,
        )
    except (ValueError, TypeError, NotImplementedError) as refusal:
        return Result(condition, refused=f"{type(refusal).__name__}: {refusal}")
    except Exception as error:
        while error.__cause__ is not None:  # a pipeline raises an error of its own from that of a stage
            error = error.__cause__
        return Result(condition, broke=f"{type(error).__name__}: {error}")
    return Result(condition, errors)


def degrees_of(args: argparse.Namespace) -> Degrees:
    return Degrees(args.pp, args.dp_replicate, args.dp, args.cp, args.tp, args.ep, args.sequence_parallel)


def join() -> torch.device:
    """NCCL with one GPU per local rank where there are that many, gloo on CPU else."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return torch.device("cpu")


def title(args: argparse.Namespace) -> str:
    size = ", shrunk" if args.subject.shrink and not args.subject.is_function else ""
    layout = f"{degrees_of(args)}{f', {args.schedule}' if args.pp > 1 else ''}"
    compiled, eager = (f", layers compiled by {args.compile}", " eager") if args.compile else ("", "")
    batch = f"{args.batch} sequences of {args.seq_len} tokens"
    return f"{args.model}{size}: {layout}{compiled}; {batch} against one{eager} process"
