"""Before a step, every rank of a pipeline learns what the others were called with, or what is wrong with it.

One all-gather of a row of int64 per rank and one host sync, however much there is to say::

    row   error, batch, seq_len, rows, shards, dtypes, mode, description | tokens | three words per copy | text
                                                            known to the device ^^^^^^^^^^^^^^^^^^^

Each rank looks at its own call and raises nothing; what it finds wrong goes into the row, in words. All ranks read the
same rows, so that all raise the same error, or none.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist

from am_pipeline.step.failure import ERRORS, kind_of
from am_pipeline.step.inputs import TEXT_BYTES
from am_pipeline.step.shared import SharedCopies

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Report:
    """What one rank says about its call of a step; numbers of the first and the last stage are 0 elsewhere.

    Attributes:
        error: 1 + the place of its kind in `ERRORS` if something is wrong with this rank's call, whose words are the
            text; else 0.
        batch, seq_len: shape of the ids, from the first stage's rank.
        rows: sequences of the target, from the last stage's rank.
        shards: ranks over which the sequence is sharded between layers.
        lowest_dtype, highest_dtype: of its stages' hidden states, by place in `_DTYPES`.
        mode: whether it trains or evaluates, with parts in training mode or not; the same on all ranks.
        described: bytes of the description of shared inputs, from the first stage's rank; it is the text if it fits.
    """

    error: int = 0
    batch: int = 0
    seq_len: int = 0
    rows: int = 0
    shards: int = 1
    lowest_dtype: int = 0
    highest_dtype: int = 0
    mode: int = 0
    described: int = 0

    def note_dtypes(self, dtypes: list[torch.dtype]) -> None:
        places = [_DTYPES.index(dtype) for dtype in dtypes]
        self.lowest_dtype, self.highest_dtype = min(places), max(places)

    def note_error(self, error: Exception) -> None:
        self.error = kind_of(error)


@dataclass
class Agreement:
    """The call of a step as all ranks know it."""

    batch: int
    seq_len: int
    tokens: int
    described: int
    text: str = field(repr=False)


def exchange_reports(
    report: Report,
    text: str,
    more: list[int | torch.Tensor],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[int]]:
    """The rows of all ranks of a pipeline.

    Args:
        report: this rank's.
        text: words of its error, or the description of what the first stage's rank shares.
        more: the number of labels in its target, and the words of its copies of shared parameters.
        group, device: of the pipeline.

    Collectives (`group`): one all-gather of about 1.2 kB per rank; one host sync.
    """
    known: list[Any] = [*astuple(report), *more, *_write_text(text)]
    # What a device knows stays there until the one sync: a scalar tensor is copied into its place.
    words = [0 if isinstance(word, torch.Tensor) else word for word in known]
    row = torch.tensor(words, dtype=torch.int64, pin_memory=device.type != "cpu" and torch.accelerator.is_available())
    row = row.to(device, non_blocking=True)
    for place, word in enumerate(known):
        if isinstance(word, torch.Tensor):
            row[place].copy_(word, non_blocking=True)
    everyone = torch.empty(dist.get_world_size(group), len(known), dtype=torch.int64, device=device)
    dist.all_gather(list(everyone.unbind()), row, group=group)
    return everyone.tolist()


def read_reports(
    rows: list[list[int]], copies: SharedCopies, first_rank: int, cause: Exception | None = None
) -> Agreement:
    """What the rows of all ranks say. The same on every rank, errors included.

    Args:
        rows: from `exchange_reports`, by group rank.
        copies: of shared parameters.
        first_rank: group rank of the first stage.
        cause: the error of this rank, if it found one.

    Raises:
        ValueError, TypeError, RuntimeError: what is wrong with some rank's call.
    """
    width = len(fields(Report))
    reports = [Report(*row[:width]) for row in rows]
    texts = [_read_text(row[-TEXT_BYTES // 8 :]) for row in rows]
    for rank, each in enumerate(reports):
        if each.error:
            raise ERRORS[each.error - 1](texts[rank]) from cause
    _check_reports(reports)
    copies.check([row[width + 1 : -TEXT_BYTES // 8] for row in rows])
    first = reports[first_rank]
    return Agreement(first.batch, first.seq_len, sum(row[width] for row in rows), first.described, texts[first_rank])


def _check_reports(reports: list[Report]) -> None:
    batch = max(each.batch for each in reports)
    seq_len = max(each.seq_len for each in reports)
    rows = max(each.rows for each in reports)
    if rows not in (0, batch):
        raise ValueError(f"the target has {rows} rows, but the batch has {batch} sequences")
    shards = max(each.shards for each in reports)
    if seq_len % shards:
        raise ValueError(
            f"seq_len={seq_len} does not divide over the {shards} ranks that shard the sequence; "
            f"pad it to {-(-seq_len // shards) * shards}"
        )
    modes = {each.mode for each in reports}
    if len(modes) > 1:
        words = ("step, evaluation mode", "eval, evaluation mode", "step, training mode", "eval, training mode")
        raise ValueError(
            f"the ranks of a pipeline do different things: {', '.join(words[m - 1] for m in sorted(modes))}"
        )
    lowest, highest = min(each.lowest_dtype for each in reports), max(each.highest_dtype for each in reports)
    if lowest != highest:
        raise ValueError(
            f"some stages have layers in {_DTYPES[highest]} and others in {_DTYPES[lowest]}, but the hidden state has "
            "one dtype throughout"
        )


def _write_text(text: str) -> list[int]:
    data = text.encode()
    if len(data) > TEXT_BYTES:
        data = data[: TEXT_BYTES - 3] + b"..."
    data = data.ljust(TEXT_BYTES, b"\0")
    return [int.from_bytes(data[at : at + 8], "little", signed=True) for at in range(0, TEXT_BYTES, 8)]


def _read_text(words: list[int]) -> str:
    data = b"".join(word.to_bytes(8, "little", signed=True) for word in words)
    return data.rstrip(b"\0").decode(errors="ignore")
