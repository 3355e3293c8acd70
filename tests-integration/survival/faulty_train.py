"""`docs/examples/train.py` with one fault in it: AM_FAULT says which, on which rank, in which step.

The fault is the real thing (a signal, an exception, a full file system, a value that is not a number), placed in the
middle of a step's forward or of a checkpoint's writing, once: the file `fault["mark"]` says that it has been. With
AM_RSS, a folder, every rank leaves its resident memory of each step there.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

TRAIN = pathlib.Path(__file__).parents[2] / "docs" / "examples" / "train.py"

sys.path.insert(0, str(TRAIN.parent))

from training.text import ByteText

RANK = int(os.environ["RANK"])
MODULES_BEFORE = 12  # of a forward: the fault comes in its middle


def main() -> None:
    if "AM_RSS" in os.environ:
        record_memory(pathlib.Path(os.environ["AM_RSS"]) / f"rank-{RANK}.txt")
    fault = json.loads(os.environ.get("AM_FAULT", "{}"))
    if fault and fault["rank"] == RANK and not os.path.exists(fault["mark"]):

        def act(outputs: Any) -> Any:
            pathlib.Path(fault["mark"]).write_text(f"{time.time()!r}")
            return ACTS[fault["act"]](outputs)

        if "file" in fault:
            when_synced(fault["file"], fault.get("after", 0), act)
        else:
            in_the_middle_of_step(fault["step"], act)
    runpy.run_path(str(TRAIN), run_name="__main__")


def in_the_middle_of_step(step: int, act: Callable[[Any], Any]) -> None:
    called = {"modules": 0, "step": 0}

    def count(_module: Any, _inputs: Any, outputs: Any) -> Any:
        called["modules"] += called["step"] == step
        if called["modules"] >= MODULES_BEFORE and isinstance(outputs, torch.Tensor):
            called.update(modules=0, step=0)  # once
            return act(outputs)
        return None

    def begin(number: int) -> None:
        called["step"] = number

    on_each_step(begin)
    register_module_forward_hook(count)


def on_each_step(act: Callable[[int], None]) -> None:
    batch = ByteText.batch

    def counted(self: ByteText, sequences: int, seq_len: int, seed: int, step: int) -> Any:
        act(step + 1)
        return batch(self, sequences, seq_len, seed, step)

    ByteText.batch = counted


def when_synced(name: str, after: int, act: Callable[[Any], Any]) -> None:
    """Act when a file whose path ends so was written and is about to be made durable, `after` times later."""
    fsync = os.fsync
    times = iter(range(after, -1, -1))

    def watched(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name) and next(times) == 0:
            act(None)
        fsync(descriptor)

    os.fsync = watched


def kill(_outputs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_(_outputs: Any) -> None:
    raise RuntimeError("a layer that breaks")


def stop(_outputs: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate(_outputs: Any) -> None:
    """The launcher is told to stop, and passes it on to the ranks; the step goes on when this one has heard."""
    os.kill(os.getppid(), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and time.monotonic() < deadline:
        signal.sigtimedwait([], 0.01)


def hang(_outputs: Any) -> None:
    threading.Event().wait()


def not_a_number(outputs: torch.Tensor) -> torch.Tensor:
    return outputs * float("nan")


def limit_files(_outputs: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


ACTS = {
    "kill": kill,
    "raise": break_,
    "stop": stop,
    "terminate": terminate,
    "hang": hang,
    "nan": not_a_number,
    "limit": limit_files,
}


def record_memory(path: pathlib.Path) -> None:
    page = resource.getpagesize()

    def note(step: int) -> None:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        with path.open("a") as file:
            file.write(f"{step} {pages * page}\n")

    on_each_step(note)


if __name__ == "__main__":
    main()
