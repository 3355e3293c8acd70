"""Whether a model is what its class makes of its config, so that a plan written for the class needs no proof.

The class is built once more on the meta device, which costs no memory and little time, and the two are compared module
by module: classes, whose forward they run, names of children and parameters, shapes. No number is read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from am_tp_plans._torch_compat import forward_hooks
from am_tp_plans.adapters import has_copies, without_peft
from am_tp_plans.stacks import stacks_of

_OURS = ("am_tp_styles.", "am_tp_plans.", "am_fsdp.", "am_moe.", "am_pipeline.")
# Hooks that note what a module returns, or let an embedding's output ask for a gradient.
_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils", "peft.", *_OURS)
_FORWARDS = ("torch.utils.checkpoint", *_OURS)
_CLASSES = ("transformers.", "torch.nn.")
_as_built: dict[tuple[type, str], nn.Module] = {}


def what_was_edited(model: nn.Module) -> str | None:
    """What a model has that transformers' own of its class and config has not, in words; None if there is nothing.

    Adapters of peft are looked through, and so is what these packages put over a module. Modules that a pipeline cut
    left out are no difference.
    """
    try:
        stock = _built(model)
    except Exception as error:  # whatever a class says to its own config
        return f"it cannot be built from its config ({type(error).__name__}: {error})"
    comparison = _Comparison(set(stacks_of(stock)))
    try:
        comparison.compare("", model, stock)
    except _OtherError as difference:
        return str(difference)
    return comparison.left_out_alone()


class _OtherError(Exception):
    """Where two models differ."""


def _built(model: Any) -> nn.Module:
    kind = next(cls for cls in reversed(type(model).__mro__) if _name(cls) == _name(type(model)))  # the innermost
    key = (kind, model.config.to_json_string())
    if key not in _as_built:
        with torch.device("meta"):
            _as_built[key] = kind(copy.deepcopy(model.config))
    return _as_built[key]


@dataclass
class _Comparison:
    """Of a model with a new one.

    Attributes:
        stacks: names of the lists of layers.
        seen: names of the modules that were compared, by identity.
        left_out: names of modules that a pipeline may have left out, and what should be there.
    """

    stacks: set[str]
    seen: dict[int, str] = field(default_factory=dict)
    left_out: dict[str, nn.Module] = field(default_factory=dict)

    def compare(self, name: str, given: nn.Module, stock: nn.Module) -> None:
        """
        Raises:
            _OtherError: they differ.
        """
        for module in _copies(given):
            if self._is_left_out(name, module, stock):
                self.left_out[name] = stock
                continue
            where, inner = name or "the model", without_peft(module)
            other = self.seen.setdefault(id(inner), where)
            if other != where:
                raise _OtherError(f"{where} and {other} are one module")
            for part in {id(m): m for m in (given, module, inner)}.values():
                _check_hooks(where, part)
            _check_own(where, inner, stock)
            children, wanted = dict(inner.named_children()), dict(stock.named_children())
            if children.keys() != wanted.keys():
                raise _OtherError(f"{where} has the modules {sorted(children)}, not {sorted(wanted)}")
            for child, its in children.items():
                self.compare(f"{name}.{child}" if name else child, its, wanted[child])

    def _is_left_out(self, name: str, module: nn.Module, stock: nn.Module) -> bool:
        """Whether a pipeline cut may have left it out: am-pipeline's stand-in, or an identity outside of layers."""
        if "boundary" in vars(module):
            return True
        outside = not any(name.startswith(f"{stack}.") for stack in self.stacks)
        return type(module) is nn.Identity is not type(stock) and (outside or name.rpartition(".")[0] in self.stacks)

    def left_out_alone(self) -> str | None:
        """A module that no cut leaves out alone: a norm, but no layer, embedding or head."""
        ends = [n for n, m in self.left_out.items() if isinstance(m, (nn.Embedding, nn.Linear)) or self._is_layer(n)]
        return f"it has no {next(iter(self.left_out))}" if self.left_out and not ends else None

    def _is_layer(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.stacks


def _copies(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself, or those that peft's `modules_to_save` may run in its place."""
    inner = dict(module.named_children())
    if not has_copies(module):
        yield module
        return
    yield inner["original_module"]
    yield from inner["modules_to_save"].children()


def _check_hooks(where: str, module: nn.Module) -> None:
    for hook in forward_hooks(module):
        if not _origin(hook).startswith(_HOOKS):
            raise _OtherError(f"{where} has a forward hook, {getattr(hook, '__qualname__', hook)!s}")


def _check_own(where: str, module: nn.Module, stock: nn.Module) -> None:
    """Class, forward and parameters of one module."""
    own = vars(module).get("forward")
    if own is not None and not _origin(own).startswith(_FORWARDS):
        raise _OtherError(f"{where} has a forward put on itself")
    kind = next((cls for cls in type(module).__mro__ if not cls.__module__.startswith(_OURS)), nn.Module)
    if not kind.__module__.startswith(_CLASSES):
        raise _OtherError(f"{where} is a {_name(kind)}, which is no class of transformers")
    if _name(kind) != _name(type(stock)):
        raise _OtherError(f"{where} is a {_name(kind)}, not a {_name(type(stock))}")
    runs = next(cls for cls in type(stock).__mro__ if "forward" in vars(cls))
    if _origin(vars(runs)["forward"]) != runs.__module__:
        raise _OtherError(f"{runs.__qualname__}.forward was replaced by one of {_origin(vars(runs)['forward'])}")
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters(recurse=False)} for m in (module, stock)]
    if shapes[0] != shapes[1]:
        raise _OtherError(f"{where} has the parameters {shapes[0]}, not {shapes[1]}")


def _origin(function: Any) -> str:
    """The module of Python that a function is from; of a partial one, what it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', '')}"


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
