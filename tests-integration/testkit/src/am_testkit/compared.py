"""A loop over ranks against one process, word by word: losses, norms, gradients, and the weights in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from am_testkit.batches import Batch
from am_testkit.conditioned import MeanOfAll, autocast, build_model, output_of
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.pairwise import Case
from am_testkit.programs import LARGEST_NORM, Loop, OneProcess, program, zeros_of_a_copy

# Softmax and norms of transformers are float32 even in a float64 model: what is smaller than this beside the largest
# gradient is their rounding.
_ROUNDING = {"float64": 1e-6, "float32": 1e-3}


class OnRanks(Loop):
    """The loop of one rank of a layout that is not cut into stages.

    Args:
        case: of `am_testkit.conditions`.
        model: laid out.
        share: what this rank is given of the batch of all.
        clip: of named parameters and the largest norm, the norm.
        ranks: over how many gradients are averaged.
    """

    def __init__(
        self, case: Case, model: nn.Module, share: Callable[[Batch], Batch], clip: Callable, ranks: int
    ) -> None:
        super().__init__(case, [model], MeanOfAll(case, ranks))
        self.model, self.share, self.clip_to = model, share, clip

    def train(self, batch: Batch) -> torch.Tensor:
        loss = self.loss(self.share(batch))
        loss.backward()
        return mean_over_world(loss.detach())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        return mean_over_world(self.loss(self.share(batch)))

    def clip(self) -> torch.Tensor:
        return self.clip_to(list(self.model.named_parameters()), LARGEST_NORM)

    def copy(self) -> torch.Tensor:
        return whole(zeros_of_a_copy(self.model, self.case, self.share(self.next())))

    def loss(self, batch: Batch) -> torch.Tensor:
        dtype = autocast(self.case)
        with torch.autocast(device_type(), dtype) if dtype is not None else contextlib.nullcontext():
            output = self.model(batch.ids, **batch.inputs)
            return self.loss_fn(whole(output_of(output, self.case["head"])), batch.labels)


def compare(case: Case, laid_out: Loop) -> dict[str, float]:
    """Relative errors of every loss, gradient and norm of a program, and of the weights after it, by what and where."""
    one, errors = OneProcess(case, build_model(case)), {}
    for place, word in enumerate(program(case)):
        said, expected = laid_out.say(word), one.say(word)
        if expected is not None:
            errors[f"{place} {word}"] = relative_error(said, expected, 1e-12)
        if word in ("step", "longer"):
            errors |= {f"{place} gradient of {n}": e for n, e in compare_gradients(laid_out, one).items()}
    weights = dict(one.model.named_parameters(remove_duplicate=False))
    for part in laid_out.parts:
        for name, parameter in part.named_parameters():
            errors[f"weight {name}"] = relative_error(parameter, weights[name])
    return errors


def compare_gradients(laid_out: Loop, one: OneProcess) -> dict[str, float]:
    """Relative errors of the gradients of this rank's parts, by name. Collective, where they are sharded."""
    wanted = dict(one.model.named_parameters(remove_duplicate=False))
    largest = max(p.grad.abs().max().item() for p in wanted.values() if p.grad is not None)
    floor = _ROUNDING.get(one.case["numbers"], 1e-1) * largest
    errors = {}
    for part in laid_out.parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            expected = wanted[name].grad if wanted[name].requires_grad else None
            if parameter.requires_grad != wanted[name].requires_grad:
                raise AssertionError(f"{name} is trained here, or in one process, but not in both")
            if parameter.grad is not None or expected is not None:
                actual, expected = (torch.zeros(()) if g is None else whole(g) for g in (parameter.grad, expected))
                actual, expected = torch.broadcast_tensors(actual, expected)
                errors[name] = relative_error(actual, expected, floor)
    return errors


def clip_whole_gradients(named: Iterable[tuple[str, nn.Parameter]], largest: float) -> torch.Tensor:
    """Clip by the norm of whole gradients, as one process does. Collective, where they are sharded."""
    trained = [parameter for _, parameter in named if parameter.grad is not None]
    norm = torch.stack([whole(parameter.grad).double().norm() for parameter in trained]).norm()
    for parameter in trained:
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        local.mul_(min(1.0, largest / (norm.item() + 1e-6)))
    return norm


def mean_over_world(loss: torch.Tensor | None) -> torch.Tensor:
    """Over the ranks that have a loss: each stands for its share of all labels. An all-reduce of two numbers."""
    pair = torch.zeros(2, dtype=torch.float64)
    if loss is not None:
        pair += torch.stack([whole(loss).double(), torch.ones((), dtype=torch.float64)])
    dist.all_reduce(pair)
    return pair[0] / pair[1]


def largest_anywhere(error: float) -> float:
    """The largest of all ranks' numbers. An all-reduce of one."""
    worst = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()
