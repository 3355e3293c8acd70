"""The conditions that a model can be verified under, and the batches and calls that they are made of."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

IGNORED = -100

# What a loop calls: a step is forward and backward, an update the optimizer's step and no gradients after it.
CALLS = {
    "one": "step",
    "three": "step clip update step clip update step clip update",
    "accumulate": "step step step clip update step",
    "eval": "step eval step clip update step",
}
VALUES = {
    "attention": ("sdpa", "eager", "flex_attention", "flash_attention_2"),
    "numbers": ("float32", "bfloat16", "mp_policy", "float64"),
    "batch": ("ids", "padding", "left-padding", "packed"),
    "calls": tuple(CALLS),
}
# What most users have.
USUAL = {"attention": ("sdpa",), "numbers": ("float32", "bfloat16"), "batch": ("padding",), "calls": ("three",)}


@dataclass(frozen=True)
class Condition:
    """One of each.

    Attributes:
        attention: transformers' name of it.
        numbers: `bfloat16` is float32 weights under `torch.autocast`, `mp_policy` the same by FSDP2's policy.
        batch: what the model is called with besides ids, and labels where there is no padding.
        calls: of `CALLS`.
    """

    attention: str
    numbers: str
    batch: str
    calls: str

    def __str__(self) -> str:
        return ", ".join(getattr(self, field.name) for field in fields(self))

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return torch.float64 if self.numbers == "float64" else torch.float32

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.numbers == "bfloat16" else None

    @property
    def mp_policy(self) -> MixedPrecisionPolicy | None:
        if self.numbers != "mp_policy":
            return None
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    @property
    def tolerance(self) -> float:
        """The largest relative error that is rounding: in bfloat16 each sum differs in its eighth bit."""
        return {"float64": 1e-5, "float32": 1e-4}.get(self.numbers, 6e-2)

    @property
    def floor(self) -> float:
        """Gradients this small beside the largest are rounding, and are compared with this share of it."""
        return {"float64": 1e-6, "float32": 1e-3}.get(self.numbers, 1e-1)


def read(words: list[str]) -> list[Condition]:
    """Every combination of what `attention=sdpa,eager calls=one` asks for; what is not named is usual.

    Raises:
        ValueError: no such condition or value, and what there is.
    """
    chosen = dict(USUAL)
    for word in words:
        name, _, values = word.partition("=")
        if name not in VALUES:
            raise ValueError(f"--conditions {word!r}: there is no {name!r}; there are {', '.join(VALUES)}")
        chosen[name] = tuple(values.split(","))
        for value in chosen[name]:
            if value not in VALUES[name]:
                raise ValueError(f"--conditions {word!r}: {name} can be {', '.join(VALUES[name])}")
    return [Condition(*values) for values in itertools.product(*(chosen[name] for name in VALUES))]


def build_batch(kind: str, sequences: int, length: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, ...]:
    """`(ids, labels, inputs)` of a step over all ranks: labels are shifted, and -100 where there is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (sequences, length + 1), generator=generator)
    ids, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    places = torch.arange(length).expand(sequences, length)
    if kind == "packed":
        first = (length // 2 + torch.arange(sequences) % 3)[:, None]  # tokens of the first document of each row
        return ids, labels, {"position_ids": torch.where(places < first, places, places - first)}
    if kind == "ids":
        return ids, labels, {}
    missing = (torch.arange(sequences) * 5 % (length // 2))[:, None]
    real = places < length - missing if kind == "padding" else places >= missing
    predicts = real & torch.cat([real[:, 1:], real[:, -1:]], 1)
    return ids, labels.masked_fill(~predicts, IGNORED), {"attention_mask": real.long()}


class MeanOfAll:
    """Cross entropy averaged over the labels of all ranks and microbatches, where gradients are averaged over these.

    Attributes:
        labelled: how many labels the step has in all.
        shares: how many losses a step's gradient is averaged over: microbatches x data ranks x context ranks.
    """

    def __init__(self, shares: int = 1) -> None:
        self.shares, self.labelled = shares, 1

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"the model returns {tuple(logits.shape)}, not logits for the labels {tuple(labels.shape)}"
            )
        wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        total = nn.functional.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total * (self.shares / self.labelled)
