"""May I trust a layout on my model? Train it and one process with the same calls, and compare every gradient.

    python docs/examples/verify.py llama --pp 2 --tp 2
    torchrun --nproc-per-node 4 docs/examples/verify.py path/to/folder --pp 2 --dp 2 --shrink

The first starts as many processes as the degrees say. The exit code is 0 where the layout is exact, 1 where it is
wrong, 2 where it is refused; torchrun itself makes 1 of every code but 0, and says at the end which it was.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import sys

from verifying import conditions
from verifying.model import Subject


def main() -> int:
    args = parse_arguments()
    if "RANK" not in os.environ:
        return start_ranks(math.prod(getattr(args, axis) for axis in AXES))
    from verifying.ranks import verify  # what the ranks need takes seconds to import, and who starts them does not

    return verify(args)


AXES = ("pp", "dp_replicate", "dp", "cp", "tp")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_argument_group("model")
    model.add_argument("model", help="a model type of transformers, a Hugging Face folder, or module:function")
    model.add_argument(
        "--shrink",
        action=argparse.BooleanOptionalAction,
        help="few layers, small widths, random weights; the default for a model type",
    )
    layout = parser.add_argument_group("layout; at least two ranks")
    layout.add_argument("--pp", type=int, default=1, help="pipeline stages' ranks")
    layout.add_argument("--dp", type=int, default=1, help="data-parallel ranks, sharded with FSDP2")
    layout.add_argument("--dp-replicate", type=int, default=1, help="copies of those, which average gradients (HSDP)")
    layout.add_argument("--cp", type=int, default=1, help="context-parallel ranks")
    layout.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    layout.add_argument("--ep", type=int, default=1, help="ranks of a pipeline stage that share the experts")
    layout.add_argument("--sequence-parallel", action="store_true", help="shard the sequence between layers over tp")
    layout.add_argument("--schedule", default="1F1B", help="any schedule of torch.distributed.pipelining")
    layout.add_argument(
        "--recompute", help="a mode of am_fsdp.checkpoint_layers: full, mlp or selective", default=False
    )
    layout.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile each layer of the layout, with inductor or the backend named; one process stays eager",
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument("--microbatch", type=int, default=2, help="sequences per microbatch")
    steps.add_argument(
        "--batch", type=int, help="sequences per step over all ranks; enough for the stages if not given"
    )
    steps.add_argument("--seq-len", type=int, default=32)
    steps.add_argument(
        "--conditions",
        nargs="+",
        default=[],
        metavar="NAME=VALUE,…",
        help="; ".join(f"{name}: {', '.join(values)}" for name, values in conditions.VALUES.items()),
    )
    args = parser.parse_args(words)
    if min(getattr(args, axis) for axis in (*AXES, "ep")) < 1 or max(getattr(args, axis) for axis in AXES) < 2:
        parser.error("a layout of one rank is one process; give --pp, --dp, --dp-replicate, --cp or --tp at least 2")
    if args.compile and args.compile not in (known := backends()):
        parser.error(f"--compile {args.compile}: torch has no such backend; it has {', '.join(known)}")
    try:
        args.conditions = conditions.read(args.conditions)
    except ValueError as error:
        parser.error(str(error))
    if args.batch is None:
        args.batch = args.dp_replicate * args.dp * args.microbatch * 2 * args.pp
    args.subject = subject_of(args)
    return args


def backends() -> list[str]:
    import torch  # not by those who start the ranks for a layout that is not compiled

    return torch.compiler.list_backends(exclude_tags=())


def subject_of(args: argparse.Namespace) -> Subject:
    shrinks = not os.path.isdir(args.model) if args.shrink is None else args.shrink
    return Subject(args.model, shrinks, layers=max(4, 2 * args.pp), ranks_of_heads=args.tp)


def start_ranks(processes: int) -> int:
    """Start this script under torchrun, and return the exit code of the rank that failed first."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    script = str(pathlib.Path(__file__).resolve())
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={processes}", script, *sys.argv[1:]]))
    except ChildFailedError as failed:
        return max(failed.get_first_failure()[1].exitcode, 1)  # less than 0: it was ended by a signal
    return 0


if __name__ == "__main__":
    code = main()
    # Not sys.exit: a gloo thread that lets go of its last work while the interpreter finalises aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
