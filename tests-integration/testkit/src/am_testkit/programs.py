"""What a training loop calls, and in which order: words, and one process that does what they say.

optimizer   make it                           clip      the norm of all gradients, to 0.1
step        forward and backward of a batch   update    the optimizer's step, and no gradients after it
longer      the same of another length        freeze    the embedding, from now on
eval        a forward without gradients       unfreeze  it again
error       a batch that is refused           copy      the model, and fill the copy with zeros
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from am_testkit import conditions
from am_testkit.batches import Batch, build_batch
from am_testkit.conditioned import MeanOfAll, autocast, groups, output_of
from am_testkit.device import device_type
from am_testkit.pairwise import Case

PROGRAMS = {
    "one step": "optimizer step clip update step",
    "three steps": "optimizer step step step clip update step",
    "eval between": "optimizer step eval step clip update step",
    "another length": "optimizer step longer clip update step longer clip update step",
    "forward before clipping": "optimizer step eval clip update step",
    "forward before the optimizer": "eval optimizer step clip update step",
    "forward before freezing": "optimizer step clip update eval freeze step clip update step",
    "error survived": "optimizer error step clip update error step",
}
LARGEST_NORM, RATE = 0.1, 0.1
LONGER = 8  # tokens more


def program(case: Case) -> list[str]:
    """The words of a case, in order."""
    words = PROGRAMS[case["calls"]].split()
    if case["copies"] == "deep copy":
        words.insert(0, "copy")
    if case["trained"] == "frozen at first":
        words += ["clip", "update", "unfreeze", "step", "clip", "update", "step"]
    return words


class Loop:
    """A training loop that says each word; what is one process's and what a layout's is left to `OneProcess` and tests.

    Attributes:
        case: of `am_testkit.conditions`.
        parts: the models trained here.
        loss_fn: the mean over all labels of a step.
    """

    def __init__(self, case: Case, parts: list[nn.Module], loss_fn: MeanOfAll) -> None:
        self.case, self.parts, self.loss_fn = case, parts, loss_fn
        self.steps = 0
        self.optimizers: list[torch.optim.Optimizer] = []

    def say(self, word: str) -> torch.Tensor | None:
        """Do what a word of a program says; a loss, a norm, what a copy returns, or None."""
        return getattr(self, word)()

    def optimizer(self) -> None:
        for part in self.parts:
            parameters = groups(self.case, part.named_parameters())
            self.optimizers.append(torch.optim.SGD(parameters, lr=RATE, foreach=False))

    def step(self) -> torch.Tensor:
        return self.train(self.next())

    def longer(self) -> torch.Tensor:
        return self.train(self.next(conditions.length(self.case) + LONGER))

    def eval(self) -> torch.Tensor:
        return self.evaluate(self.next())

    def error(self) -> None:
        batch = self.next()
        labels = batch.labels[:-1] if batch.labels.dim() == 1 else batch.labels[:-1, :-1]
        short = Batch(batch.ids, labels.contiguous(), batch.inputs)
        try:
            self.train(short)
        except ValueError:
            self.zero_grad()
        else:
            raise AssertionError("labels that are short of a row were accepted")

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def freeze(self, trained: bool = False) -> None:
        for part in self.parts:
            for name, parameter in part.named_parameters(remove_duplicate=False):
                tied_head = self.case["weights"] != "untied" and name.endswith(("lm_head.weight", "decoder.weight"))
                if "embed_tokens" in name or "word_embeddings" in name or tied_head:
                    parameter.requires_grad_(trained)

    def unfreeze(self) -> None:
        self.freeze(trained=True)

    def next(self, length: int | None = None) -> Batch:
        """The whole batch of the next step."""
        self.steps += 1
        batch = build_batch(self.case, self.steps, length)
        self.loss_fn.labelled = batch.labelled()
        return batch

    def train(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def evaluate(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def clip(self) -> torch.Tensor:
        raise NotImplementedError

    def copy(self) -> torch.Tensor:
        raise NotImplementedError


class OneProcess(Loop):
    """The loop of one process: what every layout is compared with."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__(case, [model], MeanOfAll(case))
        self.model = model

    def train(self, batch: Batch) -> torch.Tensor:
        loss = self.loss(batch)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        return self.loss(batch)

    def clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM, foreach=False)

    def copy(self) -> torch.Tensor:
        return zeros_of_a_copy(self.model, self.case, self.next())

    def loss(self, batch: Batch) -> torch.Tensor:
        dtype = autocast(self.case)
        with torch.autocast(device_type(), dtype, enabled=dtype is not None):
            return self.loss_fn(output_of(self.output(batch), self.case["head"]), batch.labels)

    def output(self, batch: Batch) -> object:
        if self.case["numbers"] == "bfloat16 by mp_policy":  # as FSDP2 does: parameters are cast, buffers are not
            cast = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
            return torch.func.functional_call(self.model, cast, (batch.ids,), batch.inputs)
        return self.model(batch.ids, **batch.inputs)


def zeros_of_a_copy(model: nn.Module, case: Case, batch: Batch | None) -> torch.Tensor:
    """What a copy without weights computes, summed: zero, if it computes with its own. The model keeps its weights.

    Args:
        model: to copy.
        case: of the model.
        batch: what the copy is called with; None for a part that cannot be called alone.
    """
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        if batch is None:
            return torch.zeros(())
        return output_of(twin(batch.ids, **batch.inputs), case["head"]).abs().sum()
