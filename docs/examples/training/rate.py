"""The learning rate of each step, a function of the step alone: a run that resumes needs no state of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rate:
    """Grows over `warmup` steps to `top`, then stays or falls along half a cosine to a tenth of it at the last step."""

    top: float
    warmup: int
    steps: int
    decay: str

    def at(self, step: int) -> float:
        """The rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.top * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.top
        done = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.top * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))

    def set(self, step: int, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.at(step)
