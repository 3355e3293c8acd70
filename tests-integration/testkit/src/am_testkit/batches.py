"""The batch of a condition: ids, labels, and what else a model is called with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from am_testkit import conditions
from am_testkit.pairwise import Case

VOCABULARY, PADDING, IGNORED = 96, 0, -100
KEPT = 4  # tokens of `logits_to_keep`


@dataclass(frozen=True)
class Batch:
    """What a step takes: `(B, S)` ids, labels with a leading dim of B, and keyword inputs.

    Attributes:
        ids: `(B, S)` int64.
        labels: `(B, S)`; `(B,)` for sequences, `(B, 2)` for questions.
        inputs: masks and positions; those of one row are for every row.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    inputs: dict[str, torch.Tensor | int] = field(default_factory=dict)

    def rows(self, rows: slice) -> Batch:
        """The share of a data rank."""

        def share(value: torch.Tensor | int) -> torch.Tensor | int:
            return value[rows] if isinstance(value, torch.Tensor) and value.shape[0] == len(self.ids) else value

        inputs = {name: share(value) for name, value in self.inputs.items()}
        return replace(self, ids=self.ids[rows], labels=self.labels[rows], inputs=inputs)

    def labelled(self) -> int:
        """How many labels count: the divisor of a mean over all of them."""
        return int((self.labels != IGNORED).sum())


def build_batch(case: Case, seed: int, length: int | None = None) -> Batch:
    """The batch of all ranks for one step, the same on every rank for one seed.

    Args:
        case: of `am_testkit.conditions`.
        seed: of this step.
        length: tokens per sequence, if not those of the case.
    """
    length = length or conditions.length(case)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (conditions.SEQUENCES, length + 1), generator=generator)
    ids, following = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    lengths = length - torch.arange(conditions.SEQUENCES) * 5 % max(1, length // 2)
    inputs, real = _inputs(case, ids, lengths)
    ids = torch.where(real, ids, PADDING)
    labels = _labels(case, following, real, lengths)
    if case["head"] == "last logits":
        inputs["logits_to_keep"], labels = KEPT, labels[:, -KEPT:]
    labels = labels.masked_fill(_unlabelled(case, labels), IGNORED)
    if not (labels != IGNORED).any():
        raise AssertionError("a batch without any label has no loss")
    return Batch(ids, labels, inputs)


def _inputs(case: Case, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """The keyword inputs, and which tokens are no padding."""
    rows, length = ids.shape
    places = torch.arange(length).expand(rows, length)
    everywhere = torch.ones(rows, length, dtype=torch.bool)
    kind = case["batch"]
    if kind in ("right padding", "left padding"):
        real = places < lengths[:, None] if kind == "right padding" else places >= length - lengths[:, None]
        return {"attention_mask": real.long()}, real
    if kind == "packed":
        first = (length // 2 + torch.arange(rows) % 3 - 1)[:, None]  # tokens of a row's first document
        return {"position_ids": torch.where(places < first, places, places - first)}, everywhere
    if kind in ("positions of one row", "as long as wide"):
        return {"position_ids": places[:1].contiguous()}, everywhere
    if kind == "mask of four dims":
        allowed = places[0][:, None] >= places[0][None]
        allowed = (allowed & (places[0][None] > places[0][:, None] - 6)).expand(rows, 1, length, length)
        dtype = getattr(torch, case["numbers"].split()[0])
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        return {"attention_mask": mask}, everywhere
    return {}, everywhere


def _labels(case: Case, following: torch.Tensor, real: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    if case["head"] == "sequence":
        return following[:, 0] % 3
    if case["head"] == "question":
        return torch.stack([following[:, 0] % lengths, following[:, 1] % lengths], 1)
    labels = following % 3 if case["head"] == "token" else following
    # The token after the last has no place: padding predicts nothing, and nothing predicts padding.
    predicts = real & torch.cat([real[:, 1:], real[:, -1:]], 1)
    return torch.where(predicts, labels, IGNORED)


def _unlabelled(case: Case, labels: torch.Tensor) -> torch.Tensor:
    """Which labels do not count, of the shape of the labels."""
    rows, size = torch.arange(conditions.SEQUENCES), labels[0].numel()
    out = torch.zeros(labels.shape, dtype=torch.bool)
    if case["labels"] == "uneven" and case["head"] in ("sequence", "question"):
        out[rows % 4 == 1] = True
    elif case["labels"] == "uneven":
        out = torch.arange(size) < (rows * size // (len(rows) + 1))[:, None]
    elif case["labels"] == "none in a microbatch":
        out[: conditions.microbatch(case)] = True
    elif case["labels"] == "none on a rank":
        out[-(len(rows) // conditions.data_ranks(case)) :] = True
    return out
