"""A model without memory: the same modules and code, parameters that have shapes only, on the CPU."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from am_pipeline._torch_compat import backward_hooks_of, forward_hooks_of, hooks_of
from am_pipeline._torch_compat_fakes import fake_mode

# By the name of a unit, the hooks that the model's own code puts on it while it runs.
Recorders = dict[str, tuple[Callable, ...]]

# Kernels that run on tensors of a device only, and what computes the same from the same inputs anywhere.
_ATTENTION_ANYWHERE = ("sdpa", "eager")


class Weightless:
    """The model to be traced. `fresh()` gives copies, each for one run: a forward may leave things on its modules."""

    def __init__(self, model: nn.Module) -> None:
        self.fake = fake_mode()
        self.recorders: Recorders = {}
        memo: dict[int, Any] = {}
        for module in model.modules():
            for value in vars(module).values():  # a table or a state left from an earlier forward
                if isinstance(value, torch.Tensor):
                    memo[id(value)] = _real(value)
        for buffer in model.buffers():
            memo[id(buffer)] = _real(buffer)
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(self._shaped(parameter), parameter.requires_grad)
        self.model = copy.deepcopy(model, memo)
        for module in list(self.model.modules()):
            _compute_anywhere(vars(module).get("config"))
            for name, child in module.named_children():
                if is_packed_linear(child):
                    setattr(module, name, self._unpacked(child))

    def fresh(self, training: bool) -> nn.Module:
        model = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        return model if model.training == training else model.train(training)

    def note_recorders(self, ran: nn.Module) -> None:
        """Keep the hooks by which transformers collects hidden states, which it installs when they are first asked for.

        Args:
            ran: a copy from `fresh` that has run.
        """
        for name, module in ran.named_modules():
            hooks = forward_hooks_of(module)
            own = [hook for hook in hooks if getattr(hook, "__module__", "").startswith("transformers.")]
            if own:
                self.recorders[name] = tuple(own)

    @property
    def first_input(self) -> str:
        """The name of the first argument of the model's forward."""
        return _first_parameter(self.model).name

    def __deepcopy__(self, memo: dict) -> Weightless:
        return self

    def _unpacked(self, packed: Any) -> nn.Module:
        dtype = packed.compute_dtype or torch.float32
        with self.fake:
            plain = _Unpacked(packed.in_features, packed.out_features, packed.bias is not None, dtype=dtype)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(getattr(packed, name).requires_grad)
        return plain.train(packed.training)

    def _shaped(self, parameter: nn.Parameter) -> torch.Tensor:
        with self.fake:
            return torch.empty(parameter.shape, dtype=parameter.dtype)


class _Unpacked(nn.Linear):
    """What bitsandbytes' `Linear4bit` computes, whose bits cannot be read without their numbers."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def is_packed_linear(module: nn.Module) -> bool:
    """Whether a module is a linear of bitsandbytes with its weight in 4 bits: known by name, not imported."""
    kind = type(module)
    return (
        kind.__name__ == "Linear4bit"
        and kind.__module__.startswith("bitsandbytes.nn.")
        and isinstance(module, nn.Linear)
    )


def refuse_uncopied(model: nn.Module) -> None:
    """What a copy of a model does not take along, or what would happen once for each part of it.

    Raises:
        ValueError: names it.
    """
    kind, first = type(model).__name__, _first_parameter(model)
    if first.kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        raise ValueError(
            f"the forward of {kind} takes {first}, which does not say what its first input is; cut the model inside "
            "(of a peft model without a task type: model.base_model.model)"
        )
    if hooks_of(model) or backward_hooks_of(model):
        raise ValueError(f"{kind} has hooks of its own, which would run in every part; register them after the cut")
    for name, module in model.named_modules():
        if backward_hooks_of(module):
            raise ValueError(
                f"{name} of {kind} has a hook for its backward, which a cut behind it leaves out; register it after "
                "the cut, on the part that holds it"
            )
        for key, value in vars(module).items():
            cells = getattr(value, "__closure__", None) or ()
            if any(isinstance(_content(cell), nn.Module) for cell in cells):
                raise ValueError(
                    f"{key} of {name or kind} is a function closed over a module: a part would go on with the old one; "
                    "make it a method, or give it the module as an argument"
                )


def refuse_training(model: nn.Module) -> None:
    """What would train otherwise than in one process when a model is cut; in evaluation it runs.

    Raises:
        ValueError: names it.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    rates = {name: rate for name, rate in getattr(config, "__dict__", {}).items() if "layerdrop" in name}
    rate = max((rate for rate in rates.values() if isinstance(rate, float)), default=0.0)
    if rate:
        raise ValueError(
            f"{kind} skips layers at random in training (layerdrop {rate}), on every stage others; set "
            f"{' and '.join(rates)} to 0 in its config"
        )


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _first_parameter(model: nn.Module) -> inspect.Parameter:
    return next(iter(inspect.signature(model.forward).parameters.values()))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.ones_like(tensor, device="cpu") if tensor.is_meta else tensor.to("cpu", copy=True)


def _compute_anywhere(config: Any) -> None:
    """Attention and experts of a transformers model in a form that needs no device and no numbers."""
    if getattr(config, "_attn_implementation", None) not in (None, *_ATTENTION_ANYWHERE):
        config._attn_implementation = "sdpa"
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "batched_mm"
