"""The part of the launcher's store that belongs to one start of the ranks."""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

_LOOK_AGAIN = 0.05  # seconds


def join(store: dist.Store, rank: int, world_size: int, timeout: float) -> dist.Store:
    """Meet the other ranks of this start; returns a store in which nobody else has written.

    torchrun keeps one store over restarts, and its count of restarts may differ between nodes, so what ranks of an
    earlier start have left there (addresses, failures) would be read as this start's. Here every rank says hello with a
    word of its own. Rank 0 names a session that lists the words it sees, anew when one changes, until every rank has
    answered that its word is the one listed.

        rank 1 of the start before: hello 1 = "old"
        rank 0:                     session A lists "old" for rank 1
        rank 1:                     hello 1 = "new"; A does not list it, no answer
        rank 0:                     session B lists "new"; both answer; B it is

    Raises:
        TimeoutError: on every rank, after `timeout` seconds; on rank 0 naming those that did not come.
    """
    word = uuid.uuid4().hex
    store.set(f"hello {rank}", word)
    deadline = time.monotonic() + timeout
    session, words = _lead(store, world_size, deadline) if rank == 0 else _follow(store, rank, word, deadline)
    if words is None:
        raise TimeoutError(f"rank {rank} waited {timeout:g} s for {session} to start")
    return dist.PrefixStore(session, store)


def _lead(store: dist.Store, world_size: int, deadline: float) -> tuple[str, list[str] | None]:
    session, words = "", []
    hellos = [f"hello {rank}" for rank in range(world_size)]
    while time.monotonic() < deadline:
        if not _there(store, hellos):
            continue
        seen = [store.get(hello).decode() for hello in hellos]
        if seen != words:
            session, words = uuid.uuid4().hex, seen
            store.set("session", json.dumps([session, words]))
        if _there(store, [f"{session} suits {rank}" for rank in range(1, world_size)]):
            store.set(f"{session} begins", "")
            return session, words
    late = [rank for rank in range(1, world_size) if not store.check([f"{session} suits {rank}"])]
    return f"rank {', '.join(map(str, late))}", None


def _follow(store: dist.Store, rank: int, word: str, deadline: float) -> tuple[str, list[str] | None]:
    while time.monotonic() < deadline:
        if not _there(store, ["session"]):
            continue
        session, words = json.loads(store.get("session"))
        if len(words) > rank and words[rank] == word:
            store.set(f"{session} suits {rank}", "")
            if _there(store, [f"{session} begins"]):
                return session, words
    return "the other ranks", None


def _there(store: dist.Store, keys: list[str]) -> bool:
    if store.check(keys):
        return True
    time.sleep(_LOOK_AGAIN)  # the store can wait itself, but warns of each time that nothing came
    return False
