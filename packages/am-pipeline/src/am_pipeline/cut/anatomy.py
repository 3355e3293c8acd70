"""Find the stacks of layers in a model, and what stands beside them, by structure: no model is known by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import nn

# The names under which transformers configs count decoder layers.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


@dataclass(frozen=True)
class Anatomy:
    """Where a model's parts sit. Layers are numbered through all of its stacks.

    Attributes:
        stacks: full names of the `ModuleList`s of layers in the order in which they run: `("model.layers",)`, of an
            encoder-decoder `("model.encoder.layers", "model.decoder.layers")`, or a tower's before a decoder's.
        depths: the number of layers of each.
        before: full names of the modules with parameters that run before all layers (embeddings, towers).
        after: full names of the modules with parameters that run after them (final norm, head). A module that runs
            on both sides is in both.
        between: full names of those that run between two layers of one stack, which every stage holds.
        joints: full names of those that run between two stacks, each with the layer that it stays with: the last of
            the one where it reads what that made (an encoder's final norm), else the first of the next (a decoder's
            embedding).
    """

    stacks: tuple[str, ...]
    depths: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    between: tuple[str, ...] = ()
    joints: tuple[tuple[str, int], ...] = ()

    @property
    def num_layers(self) -> int:
        return sum(self.depths)

    def layer(self, index: int) -> str:
        return self.layers[index]

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Full names of all layers, in order."""
        pairs = zip(self.stacks, self.depths, strict=True)
        return tuple(f"{stack}.{index}" for stack, depth in pairs for index in range(depth))

    def __str__(self) -> str:
        return " and ".join(self.stacks)


def candidate_stacks(model: nn.Module) -> list[str]:
    """The lists of layers, the likeliest decoder stack first.

    Where lists are as long as the layer count of `model.config`, only they count; heavier lists come before lighter
    ones.

    Raises:
        ValueError: there is no such list.
    """
    lists = layer_lists(model)
    count = config_value(model, *_LAYER_COUNTS)
    return [name for name in lists if len(model.get_submodule(name)) == count] or lists


def layer_lists(model: nn.Module) -> list[str]:
    """The outermost `ModuleList`s whose modules all have parameters, the heaviest first.

    Lists nested in another list, such as experts in a layer, do not count.

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
    return sorted(lists, key=lambda name: -sum(p.numel() for p in lists[name].parameters()))


def modules_beside(model: nn.Module, stacks: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are not ancestors of a stack, and the stacks themselves, in order of registration."""
    above = {stack.rsplit(".", depth)[0] for stack in stacks for depth in range(1, stack.count(".") + 1)}

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
