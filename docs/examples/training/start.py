"""Whether a start is a new run or continues one, and from which checkpoint."""

from __future__ import annotations

import itertools
import os
import pathlib

import torch.distributed as dist

from training import checkpoint, manifest

# What a run leaves in its folder besides checkpoints.
_OF_A_RUN = ("run", "losses.txt", "loss.png", "timeline.png", "load.png", "report.html", "model", "adapter", "latest")


def begin(folder: pathlib.Path, resume: bool) -> pathlib.Path | None:
    """The checkpoint to continue from, the newest that is sound, or None at the beginning of a run.

    A start continues with `resume`, and when the launcher starts the ranks of the same run again. Else it begins a run:
    what an earlier one left in the folder is moved to `folder/before`, or `before-2`, `before-3` where that is taken,
    so that forgotten `--resume`s lose nothing.

    Collectives (default group): a broadcast, and those of `manifest.damage` for each checkpoint that is looked at.

    Raises:
        ValueError: on every rank; there are checkpoints, and all are damaged; a rank sees another folder.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    named = folder / "run"
    decision: list = [None]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        again = named.is_file() and named.read_text() == run and (run != "none" or _restarts() > 0)
        if not (resume or again):
            _set_aside(folder)
        manifest.write_durably(named, run)
        decision = [[path.name for path in checkpoint.newest_first(folder)]]
    dist.broadcast_object_list(decision, 0)
    if not (named.is_file() and named.read_text() == run):
        raise ValueError(f"--out {folder} must be one folder that all ranks see; rank {dist.get_rank()} sees another")
    found = []
    for name in decision[0]:
        damage = manifest.damage(folder / name)
        if not damage:
            if dist.get_rank() == 0:
                for words in found:
                    print(f"damaged checkpoint passed over: {words}", flush=True)
                print(f"continues from {folder / name}", flush=True)
            return folder / name
        found += damage
    if found:
        raise ValueError(f"every checkpoint in {folder} is damaged: {'; '.join(found)}")
    return None


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _set_aside(folder: pathlib.Path) -> None:
    if not (folder / "latest").exists():
        return
    names = itertools.chain(["before"], (f"before-{number}" for number in itertools.count(2)))
    before = next(folder / name for name in names if not (folder / name).exists())
    before.mkdir()
    print(f"an earlier run in {folder} is now in {before}", flush=True)
    for path in [*folder.glob("step-*"), *(folder / name for name in _OF_A_RUN)]:
        if path.exists():
            path.rename(before / path.name)
