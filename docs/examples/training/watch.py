"""Say on every rank which rank ended a run and why, and end a run in which nothing moves any more.

A rank that is gone or no longer answers shows in the others as a connection that closed, or as a collective that never
returns. What waits in a collective cannot be woken, only its process ended. So each rank has a thread beside the one
that trains, and they talk through the launcher's store:

    a rank fails, or has not moved for `timeout` seconds: the first such rank calls the roll
        every thread answers, also of ranks that wait in a collective; a process that is gone or stopped does not
            the caller names the cause: who does not answer, else its own failure
                every rank prints the cause in one line and ends, so that the launcher can start all of them again
"""

from __future__ import annotations

import os
import pathlib
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import NoReturn, Self

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

LISTEN_EVERY = 0.25  # seconds between two looks at the store
ROLL_CALL = 5.0  # seconds in which a rank must answer

_EXAMPLE = pathlib.Path(__file__).parents[1]


class StalledError(Exception):
    """This rank has not moved for too long."""


class Watch:
    """Watches this rank for as long as the `with` block runs; an exception in it ends the process, with its cause.

    Args:
        store: what all ranks of this start share, as `dist.rendezvous` gives it.
        timeout: seconds without `at` after which the run is ended; longer than the longest step or checkpoint.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
        self.store = dist.PrefixStore("watch", store.clone())  # a connection of its own: others wait on the first
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.ending = threading.Lock()  # never released: one reason is told, and it is the last thing a rank does
        self.left = threading.Event()

    def __enter__(self) -> Self:
        self.at("the start")
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._end(error)
        self.left.set()

    def at(self, place: str) -> None:
        """Note that this rank moves, and where it is ("step 12"); asked for when it fails or is gone."""
        self.place, self.moved = place, time.monotonic()
        self.store.set(f"place of {self.rank}", place)

    def _listen(self) -> None:
        while not self.left.wait(LISTEN_EVERY):
            try:
                called = self.store.check(["caller"])
                if called and int(self.store.get("caller")) != self.rank:
                    self._follow()
            except dist.DistError:
                return  # the launcher is gone; who trains notices at the next step
            if time.monotonic() - self.moved > self.timeout:
                self._end(StalledError(f"nothing has moved for {self.timeout:g} s"))

    def _follow(self) -> NoReturn:
        """Another rank calls the roll: answer, hear the cause, end."""
        self.store.set(f"answer of {self.rank}", self._whereabouts())
        cause = self._cause()
        with self.ending:
            self._leave(f"rank {self.rank} ends in {self.place}: {cause}")

    def _end(self, error: BaseException) -> NoReturn:
        """This rank failed: find out whether it is the cause, say so, end."""
        with self.ending:
            first = _first(error)
            own = f"rank {self.rank} failed in {self.place}: {type(first).__name__}: {first}"
            try:
                self.store.set(f"answer of {self.rank}", self._whereabouts())
                if int(self.store.compare_set("caller", "", str(self.rank))) != self.rank:
                    self._leave(f"{own}\nrank {self.rank} ends in {self.place}: {self._cause()}")
                others = self._call_the_roll(error)
            except dist.DistError as lost:
                self._leave(f"{own}\nrank {self.rank}: the launcher's store is gone: {lost}")
            if others:
                self._leave(f"{own}\nrank {self.rank} ends in {self.place}: {others}", cause=others)
            if isinstance(error, Exception):
                get_error_handler().record_exception(error)  # what torchrun shows at the end
            self._leave("".join(traceback.format_exception(error)) + own, cause=own)

    def _call_the_roll(self, error: BaseException) -> str:
        """What the others are to blame for; nothing when all answer."""
        answers: dict[int, str] = {}
        deadline = time.monotonic() + ROLL_CALL
        while len(answers) < self.world_size and time.monotonic() < deadline:
            for rank in set(range(self.world_size)) - set(answers):
                if self.store.check([f"answer of {rank}"]):
                    answers[rank] = self.store.get(f"answer of {rank}").decode()
            self.left.wait(LISTEN_EVERY / 5)
        missing = sorted(set(range(self.world_size)) - set(answers))
        if missing:
            silent = "; ".join(
                f"rank {rank} does not answer, last seen in {self._last_place(rank)}" for rank in missing
            )
            return f"{silent}: killed, stopped or cut off"
        if isinstance(error, StalledError):
            places = [f"rank {rank} is in {answers[rank]}" for rank in sorted(answers)]
            return f"{error}, although every rank answers: {'; '.join(places)}"
        return ""

    def _last_place(self, rank: int) -> str:
        key = f"place of {rank}"
        return self.store.get(key).decode() if self.store.check([key]) else "nothing: it never started"

    def _cause(self) -> str:
        deadline = time.monotonic() + 2 * ROLL_CALL
        while time.monotonic() < deadline:
            if self.store.check(["cause"]):
                return self.store.get("cause").decode()
            self.left.wait(LISTEN_EVERY / 5)
        return f"rank {int(self.store.get('caller'))} failed, and was gone before it said why"

    def _whereabouts(self) -> str:
        """The line of the example that the training thread is in, and the function that it is in below."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = traceback.extract_stack(frame)
        mine = [f for f in stack if pathlib.Path(f.filename).is_relative_to(_EXAMPLE)]
        line = f"{pathlib.Path(mine[-1].filename).name}:{mine[-1].lineno}, " if mine else ""
        return f"{self.place} ({line}{stack[-1].name})"

    def _leave(self, words: str, cause: str | None = None) -> NoReturn:
        """Print, let the others go, and end; not by an exception: a process group may wait for peers that are gone."""
        sys.stdout.flush()
        sys.stderr.write(words + "\n")  # in one piece: the ranks write to the same terminal
        sys.stderr.flush()
        if cause is not None:
            self.store.set("cause", cause)
        os._exit(1)


def _first(error: BaseException) -> BaseException:
    """What it all began with: a pipeline raises an error of its own from that of a stage."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
