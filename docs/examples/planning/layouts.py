"""The layouts that a model, a batch and a number of ranks allow, as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from training.degrees import Degrees

SCHEDULES = {"1F1B": 1, "Interleaved1F1B": 2, "ZBVZeroBubble": 2}  # and how many stages a rank holds


@dataclass(frozen=True)
class Job:
    """What is asked for: `batch` sequences of `seq_len` tokens in a step over `ranks`, `per_node` of them on a node."""

    ranks: int
    per_node: int
    batch: int
    seq_len: int
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


@dataclass(frozen=True, order=True)
class Layout(Degrees):
    """Degrees, schedule, sequences in a microbatch, and what is recomputed in the backward."""

    schedule: str = "1F1B"
    microbatch: int = 1
    recompute: str = ""

    @property
    def stages_per_rank(self) -> int:
        return SCHEDULES[self.schedule] if self.pp > 1 else 1

    @property
    def data(self) -> int:
        """Ranks that a weight is sharded over, besides experts'."""
        return self.dp_shard * self.cp

    @property
    def stays_gathered(self) -> bool:
        """Whether a layer keeps its whole weights from the forward to the backward: beside context and expert ranks,
        and where a schedule splits the backward."""
        return self.cp > 1 or self.ep > 1 or (self.pp > 1 and self.schedule == "ZBVZeroBubble")

    def microbatches(self, job: Job) -> int:
        return job.batch // (self.dp * self.microbatch)

    def arguments(self, job: Job) -> str:
        """Of the main job."""
        given = {
            "--pp": self.pp, "--dp-replicate": self.dp_replicate, "--dp": self.dp_shard, "--cp": self.cp,
            "--tp": self.tp, "--ep": self.ep,
        }  # fmt: skip
        words = [f"{name} {value}" for name, value in given.items() if value > 1 or name in ("--pp", "--dp")]
        words += ["--sequence-parallel"] * self.sequence_parallel
        words += [f"--schedule {self.schedule}"] * (self.pp > 1)
        words += [f"--microbatch {self.microbatch} --batch {job.batch} --seq-len {job.seq_len}"]
        words += ["--recompute"] * bool(self.recompute) + [f"--dtype {job.dtype}"] * (job.dtype != "float32")
        return " ".join(words)

    def __str__(self) -> str:
        parts = [f"pp {self.pp}"] * (self.pp > 1)
        parts += [f"{self.dp_replicate} replicas"] * (self.dp_replicate > 1)
        parts += [f"dp {self.dp_shard}"] * (self.dp_shard > 1 or self.dp_replicate == 1)
        parts += [f"cp {self.cp}"] * (self.cp > 1)
        parts += [f"tp {self.tp}{' sp' if self.sequence_parallel else ''}"] * (self.tp > 1)
        parts += [f"ep {self.ep}"] * (self.ep > 1)
        parts += [self.schedule] * (self.pp > 1)
        return ", ".join([*parts, f"mb {self.microbatch}"] + [f"recompute {self.recompute}"] * bool(self.recompute))


def axes(job: Job, layers: int, experts: int, *, most_tp: int, most_cp: int) -> Iterator[Layout]:
    """Every division of the ranks into axes, without regard to the model but for its layers and experts.

    Tensor ranks stay on a node, for compute waits for their messages.
    """
    for pp, tp in itertools.product(_divisors(job.ranks), _divisors(job.per_node)):
        if pp > layers or tp > most_tp or job.ranks % (pp * tp):
            continue
        for cp in _divisors(job.ranks // (pp * tp)):
            if cp > most_cp or (cp > 1 and job.seq_len % (2 * cp)):
                continue
            data = job.ranks // (pp * tp * cp)
            if job.batch % data:
                continue
            for shard in _divisors(data):
                stage = job.ranks // pp
                for ep in [d for d in _divisors(stage) if d == 1 or (experts and experts % d == 0)]:
                    for sequence_parallel in (False, True)[: 1 + (tp > 1 and job.seq_len % (cp * tp) == 0)]:
                        yield Layout(pp, data // shard, shard, cp, tp, ep, sequence_parallel)


def schedules(pp: int, microbatches: int, layers: int) -> list[str]:
    """Those that take this many stages and microbatches."""
    if pp == 1:
        return ["1F1B"]
    found = [name for name, stages in SCHEDULES.items() if pp * stages <= layers and microbatches >= pp]
    return [name for name in found if name != "Interleaved1F1B" or microbatches % pp == 0]


def microbatch_sizes(local_batch: int) -> list[int]:
    """In rising order: powers of two."""
    return [size for size in (1 << power for power in range(local_batch.bit_length())) if local_batch % size == 0]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
