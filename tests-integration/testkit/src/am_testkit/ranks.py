"""One rank of one test: a forked process with a default process group, watched from outside.

A rank leaves by `os._exit` and never finalises its interpreter, because that can kill it. A gloo worker thread
(`ProcessGroupGloo::runLoop`) may hold the last reference to an asynchronous work, whose destructor takes the GIL to
drop a Python object of its thread-local state. If the interpreter is finalising by then, Python ends that thread with
`pthread_exit`; the forced unwinding meets a `noexcept` destructor, and the process dies with `terminate called
without an active exception` (SIGABRT), although all of its work is done. Of small FSDP2 runs on torch 2.13 that ended
right after backward, two of twelve died so without `destroy_process_group` and one of twelve with it, since a mesh or a
model may keep the group alive; the stack is from gdb.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest

from am_testkit.verdict import Outcome


@dataclass
class Rank:
    """A forked rank as its parent sees it."""

    rank: int
    pid: int
    report: int  # the child writes its outcome here
    release: int  # the child leaves when this is closed
    stack: pathlib.Path
    output: pathlib.Path
    outcome: Outcome | None = None
    received: bytearray = field(default_factory=bytearray)

    def poll(self) -> bool:
        """Read what the child has reported; True once its outcome is known."""
        while self.outcome is None and select.select([self.report], [], [], 0)[0]:
            chunk = os.read(self.report, 1 << 16)
            self.received += chunk
            if not chunk:
                self.outcome = self._reported() or self._crashed()
        return self.outcome is not None

    def stop(self, status: str, why: str) -> None:
        """End a rank that is still running; its stack tells where it was."""
        os.kill(self.pid, signal.SIGUSR1)  # faulthandler writes the stacks of all threads
        deadline = time.monotonic() + 1
        size = -1
        while time.monotonic() < deadline and (size <= 0 or self.stack.stat().st_size != size):
            size = self.stack.stat().st_size
            select.select([], [], [], 0.02)
        self._kill()
        stack = without_harness(self.stack.read_text())
        self.outcome = Outcome(
            self.rank, status, f"{why}\n\n{stack}", f"{why}; {innermost(stack)}", self._printed(), time.monotonic()
        )

    def leave(self) -> None:
        """Let the child go, and make sure that it and whatever it started are gone."""
        os.close(self.release)
        self._kill()
        os.close(self.report)
        for path in (self.stack, self.output):
            path.unlink(missing_ok=True)

    def _reported(self) -> Outcome | None:
        try:
            return Outcome(self.rank, output=self._printed(), **json.loads(self.received))
        except ValueError:
            return None

    def _crashed(self) -> Outcome:
        _, status = os.waitpid(self.pid, 0)
        self.pid = -self.pid  # reaped
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        stack = without_harness(self.stack.read_text())
        text = f"the process {how} before the test was over\n\n{stack}"
        return Outcome(self.rank, "crashed", text, f"the process {how}", self._printed(), time.monotonic())

    def _kill(self) -> None:
        pid = abs(self.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if self.pid > 0:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            self.pid = -pid

    def _printed(self) -> str:
        return self.output.read_text(errors="replace")


def fork_rank(
    body: Callable[[], object],
    render: Callable[[BaseException], str],
    rank: int,
    world: int,
    timeout: float,
    address: tuple[str, int],
    listener: socket.socket | None,
) -> Rank:
    """Fork a process that runs `body` as one rank of a default group of `world` ranks.

    Args:
        body: the test.
        render: turns its exception into text.
        rank, world: its place.
        timeout: seconds after which the parent stops it; collectives wait a little longer than that.
        address: where the group's store listens.
        listener: the listening socket at that address, for rank 0, which serves the store.
    """
    report_read, report_write = os.pipe()
    release_read, release_write = os.pipe()
    files = [_empty_file(f"rank{rank}-{kind}-") for kind in ("stack", "output")]
    pid = os.fork()
    if pid == 0:
        code = 70  # seen only if what follows ends without a report
        try:
            os.setsid()
            os.close(report_read)
            os.close(release_write)
            stack = open(files[0], "w")  # noqa: SIM115  (must stay open for faulthandler)
            faulthandler.enable(stack)
            faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
            output = os.open(files[1], os.O_WRONLY | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
            report = _run(body, render, rank, world, timeout, address, listener)
            sys.stdout.flush()
            _write(report_write, json.dumps(report).encode())
            os.close(report_write)
            os.read(release_read, 1)  # rank 0 serves the store: nobody leaves before all are done
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(report_write)
    os.close(release_read)
    return Rank(rank, pid, report_read, release_write, *files)


def _empty_file(prefix: str) -> pathlib.Path:
    descriptor, name = tempfile.mkstemp(prefix=prefix)
    os.close(descriptor)
    return pathlib.Path(name)


def without_harness(stack: str) -> str:
    """A faulthandler dump without the frames, oldest last, that led from pytest to the test."""
    kept, skipping = [], False
    for line in stack.splitlines():
        is_frame = line.startswith("  File ")
        skipping = is_frame and (skipping or f"am_testkit{os.sep}" in line)
        if not skipping:
            kept.append(line)
    return "\n".join(kept)


def innermost(stack: str) -> str:
    """The line of a faulthandler dump that says where the newest thread was: the first one."""
    frames = [line.strip() for line in stack.splitlines() if line.strip().startswith("File ")]
    ours = [f for f in frames if "site-packages" not in f and "/lib/python" not in f and "am_testkit" not in f]
    return f"it was at {(ours or frames)[0]}" if frames else "its stack could not be read"


def _run(body, render, rank, world, timeout, address, listener) -> dict[str, object]:
    try:
        _join(rank, world, timeout, address, listener)
        body()
    except pytest.skip.Exception as skip:
        return {"status": "skipped", "line": str(skip), "at": time.monotonic()}
    except BaseException as error:
        at = time.monotonic()
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return {"status": "failed", "text": render(error), "line": line, "at": at}
    return {"status": "passed", "at": time.monotonic()}


def _join(rank: int, world: int, timeout: float, address: tuple[str, int], listener: socket.socket | None) -> None:
    import torch.distributed as dist

    from am_testkit.device import join

    wait = timedelta(seconds=timeout + 30)
    host, port = address
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("MASTER_ADDR", host), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    serving = {"master_listen_fd": listener.detach()} if listener else {}
    store = dist.TCPStore(host, port, world, rank == 0, wait, wait_for_workers=False, use_libuv=True, **serving)
    join(store, rank, world, wait)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
