"""What a condition is made of: the model, its numbers, its loss, what of it is trained and how."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from am_testkit.batches import IGNORED
from am_testkit.models import tiny
from am_testkit.pairwise import Case

_KINDS = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
    "masked": "AutoModelForMaskedLM",
    "none": "AutoModel",
}
INNER = 2  # which of the hidden states a loss on inner states takes
DROPPED = {"embd_pdrop": 0.3, "attn_pdrop": 0.3, "resid_pdrop": 0.3}
# In bfloat16 two orders of one sum differ in the eighth bit, and gradients are sums of many; those of adapters, small
# beside what they are sums of, are 9e-2 off float32 in one process.
TOLERANCES = {"float64": 1e-5, "float32": 1e-4}
BFLOAT16_TOLERANCE, OF_ADAPTERS = 6e-2, 1.5e-1


def build_model(case: Case, seed: int = 0) -> nn.Module:
    """The model of a case, in the dtype that it is held in, with what is not trained frozen."""
    family = "bert" if case["head"] == "masked" else "qwen2_moe" if case["ep"] > 1 else "llama"
    settings = {}
    if case["dropout"] != "none":
        family, settings = "gpt2", DROPPED
    elif family == "bert":
        settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if case["head"] in ("sequence", "token"):
        settings |= {"num_labels": 3, "classifier_dropout": 0.0}
    model = tiny(
        family,
        attention={"flex": "flex_attention"}.get(case["attention"], case["attention"]),
        tied=case["weights"] != "untied",
        kind=_KINDS.get(case["head"], "AutoModelForCausalLM"),
        dtype=torch.float64,
        seed=seed,
        **settings,
    )
    if case["head"] == "inner states":
        model.config.output_hidden_states = True
    if case["trained"] == "adapters":
        _add_adapters(model, seed)
    model.to(getattr(torch, held_in(case)))
    if case["numbers"] == "bfloat16 with norm and head in float32":
        for name, module in model.named_modules():
            if name in ("model.norm", "lm_head", "score"):
                module.float()
    if case["trained"] in ("embedding frozen", "frozen at first"):
        model.get_input_embeddings().requires_grad_(False)
    return model


def held_in(case: Case) -> str:
    """The dtype of the parameters."""
    return {"float64": "float64", "bfloat16 with norm and head in float32": "bfloat16"}.get(case["numbers"], "float32")


def autocast(case: Case) -> torch.dtype | None:
    """What forward and loss run in by `torch.autocast`, if by that."""
    return torch.bfloat16 if case["numbers"] == "float32 under autocast to bfloat16" else None


def tolerance(case: Case) -> float:
    """The largest relative error that is rounding."""
    return TOLERANCES.get(case["numbers"], OF_ADAPTERS if case["trained"] == "adapters" else BFLOAT16_TOLERANCE)


def groups(case: Case, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict]:
    """An optimizer's parameter groups; by name, norms and biases apart and the head slower."""
    named = list(named)
    if case["trained"] != "groups by name":
        trained = [p for _, p in named if p.requires_grad or case["trained"] == "frozen at first"]
        return [{"params": trained}]
    rates = {"norm": 0.03, "bias": 0.03, "lm_head": 0.01}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        by_rate.setdefault(next((r for word, r in rates.items() if word in name), 0.1), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]


class MeanOfAll:
    """The mean over the labels of all ranks and microbatches, where gradients are averaged over these.

    Attributes:
        labelled: how many labels the step has in all.
        shares: over how many losses a step's gradient is averaged: microbatches x data ranks x context ranks.
    """

    def __init__(self, case: Case, shares: int = 1) -> None:
        self.head, self.shares, self.labelled = case["head"], shares, 1

    def __call__(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return sum_of_losses(self.head, output, labels) * (self.shares / self.labelled)


def sum_of_losses(head: str, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum over what is labelled, in float32 or wider.

    Args:
        head: of `conditions.AXES`.
        output: logits, or hidden states `(B, S, D)`.
        labels: of `Batch`.
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if head in ("none", "inner states"):
        if output.shape[:2] != labels.shape:
            raise ValueError(f"labels {tuple(labels.shape)} for hidden states {tuple(output.shape)}")
        wanted = (labels[..., None] % 7).to(output.dtype) / 7
        return ((output - wanted).square().mean(-1) * (labels != IGNORED)).sum()
    if head == "question":
        output = output.transpose(1, 2)  # (B, 2, S): where answers start, and where they end
    if output.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} for logits {tuple(output.shape)}")
    flat = output.flatten(0, -2), labels.flatten()
    return nn.functional.cross_entropy(*flat, ignore_index=IGNORED, reduction="sum")


def output_of(output: object, head: str) -> torch.Tensor:
    """The tensor of a model's output that the loss takes."""
    if isinstance(output, torch.Tensor):
        return output
    if head == "inner states":
        return output.hidden_states[INNER]
    if head == "question":
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.last_hidden_state if head == "none" else output.logits


def _add_adapters(model: nn.Module, seed: int) -> None:
    import peft

    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer" in f".{name}" and not name.endswith("gate")
    }
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=sorted(linears)), model)
    with torch.no_grad():  # an adapter starts at zero, which would leave half of it without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
