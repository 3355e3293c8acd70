"""Under torchrun: every process runs pytest over the same tests, in step; rank 0 alone reports.

Each process is a controller that forks one rank per test, because a blocked gloo collective can only be ended by
ending its process. What the ranks did is exchanged through torchrun's own store, never through the group under test.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from am_testkit.forked import GRACE
from am_testkit.ranks import Rank, fork_rank
from am_testkit.verdict import Outcome, Verdict, judge

# A controller that does not answer this long after a test's own timeout is gone.
PATIENCE = 60.0


class Lockstep:
    """The exchange between the controllers of one launch."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = int(os.environ["RANK"])
        self.world = int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, None, False, timedelta(seconds=120), wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"am_testkit/{attempt}", store)
        self.host = host

    def say(self, key: str, value: object) -> None:
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float) -> object:
        self.store.wait([key], timedelta(seconds=seconds))
        return json.loads(self.store.get(key))

    def hear_of(self, key: str, end: str, seconds: float) -> object:
        """`hear`, but raise at once if whoever should say it has said `end` instead."""
        deadline = time.monotonic() + seconds
        while not self.store.check([key]):
            if self.store.check([end]) or time.monotonic() > deadline:
                raise RuntimeError(f"rank 0 did not get as far as {key}")
            time.sleep(0.005)
        return self.hear(key, seconds)

    def all_say(self, key: str, value: object, seconds: float = 600.0) -> list:
        """Every controller says something; returns what all said, by rank."""
        self.say(f"{key}/{self.rank}", value)
        return [self.hear(f"{key}/{rank}", seconds) for rank in range(self.world)]

    def run(
        self,
        test: str,
        body: Callable[[], object],
        render: Callable[[BaseException], str],
        world: int,
        timeout: float,
    ) -> Verdict:
        """Run this controller's rank of a test and judge it with all ranks' outcomes: the same verdict everywhere."""
        listener = None
        if self.rank == 0:
            listener = socket.create_server(("", 0), backlog=world * 4)
            self.say(f"{test}/port", listener.getsockname()[1])
        try:
            port = self.hear(f"{test}/port", timeout + PATIENCE)
            deadline = time.monotonic() + timeout
            rank = fork_rank(body, render, self.rank, world, timeout, (self.host, port), listener)
        finally:
            if listener:
                listener.close()
        try:
            self._watch(test, rank, deadline, timeout)
            return self.judge(test, rank.outcome, world, timeout)
        finally:
            rank.leave()

    def judge(self, test: str, outcome: Outcome, world: int, timeout: float) -> Verdict:
        """Exchange outcomes; a controller whose test never got as far as forking calls this alone."""
        if outcome.status in ("failed", "crashed"):
            self.say(f"{test}/failed", outcome.rank)
        self.say(f"{test}/{self.rank}", dataclasses.asdict(outcome))
        outcomes = []
        for rank in range(world):
            try:
                outcomes.append(Outcome(**self.hear(f"{test}/{rank}", timeout + PATIENCE)))
            except Exception as error:  # torch raises DistStoreError, which has no public home
                outcomes.append(Outcome(rank, "crashed", f"its controller did not answer: {error}", "no answer"))
        return judge(outcomes)

    def _watch(self, test: str, rank: Rank, deadline: float, timeout: float) -> None:
        failed_at = None
        while not rank.poll():
            now = time.monotonic()
            if failed_at is None and self.store.check([f"{test}/failed"]):
                failed_at = now
            if failed_at is not None and now > failed_at + GRACE:
                culprit = json.loads(self.store.get(f"{test}/failed"))
                rank.stop("killed", f"stopped because rank {culprit} had failed")
            elif now > deadline:
                rank.stop("hung", f"still running after {timeout:g} seconds")
            else:
                select.select([rank.report], [], [], 0.05)
