"""Find the stacks of layers in a model, and what stands beside them, by structure: no model is known by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# The names under which transformers configs count decoder layers.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


@dataclass(frozen=True)
class Anatomy:
    """Where a decoder's parts sit.

    Attributes:
        stack: full name of the `ModuleList` of decoder layers, for example `model.layers`.
        num_layers: its length.
        before: full names of the modules with parameters that run before the stack (embeddings, encoders).
        after: full names of the modules with parameters that run after it (final norm, head). A module that runs
            on both sides is in both.
        between: full names of those that run between two layers, which every stage holds.
    """

    stack: str
    num_layers: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    between: tuple[str, ...] = ()

    def layer(self, index: int) -> str:
        return f"{self.stack}.{index}"


def candidate_stacks(model: nn.Module) -> list[str]:
    """The outermost `ModuleList`s whose modules all have parameters, the likeliest decoder stack first.

    Where lists are as long as the layer count of `model.config`, only they count; heavier lists come before lighter
    ones. Lists nested in another list, such as experts in a layer, do not count.

    Raises:
        ValueError: there is no such list.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_has_parameters(layer) for layer in module)
    }
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no ModuleList of layers: there is no decoder stack to cut")
    count = config_value(model, *_LAYER_COUNTS)
    fitting = [name for name, layers in lists.items() if len(layers) == count] or list(lists)
    return sorted(fitting, key=lambda name: -sum(p.numel() for p in lists[name].parameters()))


def modules_beside(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are not ancestors of the stack, and the stack itself, in order of registration."""
    above = {stack.rsplit(".", depth)[0] for depth in range(1, stack.count(".") + 1)}

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in above:
                yield from walk(child, f"{full}.")
            else:
                yield full, child

    return walk(model, "")


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def config_value(model: nn.Module, *names: str) -> int | None:
    """The first of these that the config of the model's decoder has as an int."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
