"""Leave the process group, when the work is done and when a signal asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _destroy_dist_connection() -> None:
    """Destroy the default process group if there is one; may be called twice, and from any thread.

    A SIGTERM or SIGINT that comes meanwhile takes effect when the group is gone, through the handler that was there.
    """
    with _held_back():
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Where a group's collectives take small tensors: on the CPU if it has a backend for that, else the accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


class Stop:
    """Whether this rank was asked to stop, and whether any was."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether any rank of the group got a signal; the same answer on all, so that they stop after the same step.

        Collectives: one all-reduce of one number over `group`, where there is a process group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.signal is not None
        flag = torch.tensor(float(self.signal or 0), device=device_of(group))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        agreed = int(flag.item())  # a signal that came during the all-reduce waits for the next call
        if agreed and self.signal is None:
            self.signal = agreed
        return agreed != 0


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Let training end between two steps when SIGTERM or SIGINT comes, and leave the process group in any case.

    For example::

        with stop_on_signal() as stop:
            for step in range(steps):
                train(step)
                if stop.requested():
                    save(step)
                    break

    The first signal only sets a flag, so a checkpoint that is being written is finished; a second one acts as it would
    have without this. On leaving, also by an exception, the handlers are put back and the process group is destroyed;
    then the signal takes its usual effect on every rank (SIGINT raises `KeyboardInterrupt`, SIGTERM ends the process
    with that signal, and the launcher sees why). An exception of the block goes before it.

    A rank that waits in a collective notices a signal when the collective returns: give the group a timeout.

    Yields:
        A `Stop`; ask `stop.requested()` at the same places on every rank.

    Raises:
        ValueError: not in the main thread, where alone Python handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("stop_on_signal works in the main thread alone, where Python handles signals")
    stop = Stop()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, _frame: Any) -> None:
        stop.signal = number
        _restore(before)

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        _restore(before)
        _destroy_dist_connection()
    if stop.signal is not None:
        signal.raise_signal(stop.signal)


@contextmanager
def _held_back() -> Iterator[None]:
    """Note signals and let them take effect afterwards; other threads than the main one are never interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        _restore(before)
    for number in came:
        signal.raise_signal(number)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
