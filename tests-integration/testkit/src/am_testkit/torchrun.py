"""Start torchrun from a test, follow what it prints line by line, and leave nothing of it behind."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Self

# What belongs to the run that the test itself may be part of.
_THEIRS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTEST_", "AM_")


class Torchrun:
    """A launcher and its ranks; as a context manager it ends what still runs when the block is left.

    Args:
        processes: ranks of this launcher.
        command: the script and its arguments.
        options: options of torchrun in front of them; `--standalone` if none is given.
        environment: variables that the ranks get besides.
    """

    def __init__(
        self,
        processes: int,
        *command: object,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        cwd: pathlib.Path | None = None,
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_THEIRS)}
        where = () if any(option.startswith("--rdzv") for option in options) else ("--standalone",)
        launcher = ("-m", "torch.distributed.run", *where, *options, f"--nproc-per-node={processes}")
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *map(str, command)],
            env=kept | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[tuple[float, str]] = []
        self.read = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        with self.read:
            return "".join(text for _, text in self.lines)

    def wait_for(self, pattern: str, timeout: float = 120) -> float:
        """When a line that matches was printed; fails when the launcher ends or the time is over before."""
        deadline = time.monotonic() + timeout
        seen = 0
        with self.read:
            while True:
                for when, text in self.lines[seen:]:
                    if re.search(pattern, text):
                        return when
                seen = len(self.lines)
                assert self.reader.is_alive(), f"the run ended without a line {pattern!r}\n{self._text()}"
                left = deadline - time.monotonic()
                assert left > 0, f"no line {pattern!r} in {timeout:g} s\n{self._text()}"
                self.read.wait(min(left, 1))

    def finish(self, timeout: float = 480) -> int:
        """The exit status, once everything is printed; what runs longer is killed, and fails."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run took longer than {timeout:g} s\n{self.output}") from None
        self.reader.join(10)
        return code

    def ranks(self) -> dict[int, int]:
        """The process of each rank that runs now."""
        launcher = self.process.pid
        children = pathlib.Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        ranks = {}
        for pid in children:
            variables = pathlib.Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
            ranks |= {int(v[5:]): int(pid) for v in variables if v.startswith("RANK=")}
        return ranks

    def kill(self) -> None:
        """The ranks have sessions of their own and outlive their launcher: they go with it."""
        if self.process.poll() is None:
            ranks = self.ranks()
            self.process.kill()
            self.process.wait()
            for pid in ranks.values():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _read(self) -> None:
        for text in self.process.stdout:
            with self.read:
                self.lines.append((time.time(), text))
                self.read.notify_all()
        with self.read:
            self.read.notify_all()

    def _text(self) -> str:
        return "".join(text for _, text in self.lines)
