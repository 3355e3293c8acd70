"""A step adds its own gradients to what was there: nothing older is scaled, summed or lost."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class GradientsSetAside:
    """What `.grad` held before a step, out of the reach of what happens in it.

    Schedules scale gradients after their microbatches, copies of a shared parameter are summed, and torch sets the
    gradients of FSDP modules to None when it sets its stages up: all of that is meant for the step's own gradients.

    Cost: nothing where gradients were None, which is every first step after `zero_grad()`. In a further one both are in
    memory until it ends (one more gradient of each parameter, sharded where the parameter is), and are added in one
    pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.before = [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in self.before:
            parameter.grad = None

    @torch.no_grad()
    def add(self) -> None:
        """`.grad` becomes the same tensor as before, with the step's gradient added to it."""
        for parameter, gradient in self.before:
            if gradient is None:
                continue
            if parameter.grad is not None:
                gradient.add_(parameter.grad)
            parameter.grad = gradient

    def restore(self) -> None:
        """`.grad` is what it was before the step."""
        for parameter, gradient in self.before:
            parameter.grad = gradient
