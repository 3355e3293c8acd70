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
    """

    stack: str
    num_layers: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    def layer(self, index: int) -> str:
        return f"{self.stack}.{index}"


def candidate_stacks(model: nn.Module) -> list[str]:
    """The outermost `ModuleList`s whose modules all have parameters, the likeliest decoder stack first.

    Lists as long as the layer count of `model.config` come before others, and heavier lists before lighter ones.
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
    count = config_value(model, *_LAYER_COUNTS)

    def rank(name: str) -> tuple:
        return len(lists[name]) != count, -sum(p.numel() for p in lists[name].parameters())

    return sorted(lists, key=rank)


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


def owners(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules at or below `module` that have parameters of their own: what a stand-in replaces."""
    containers = (nn.ParameterDict, nn.ParameterList)
    holders = (module, *(child for child in module.children() if isinstance(child, containers)))
    if any(next(holder.parameters(recurse=False), None) is not None for holder in holders):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from owners(f"{name}.{child_name}", child)


def sort_around(model: nn.Module, stack: str, called: dict[str, tuple[bool, bool]]) -> Anatomy:
    """The anatomy, given which owners a run of the model called before and after the stack.

    What was not called (an image encoder, a pooler) goes by its place of registration.
    """
    before, after = [], []
    stack_seen = False
    for name, module in modules_beside(model, stack):
        if name == stack:
            stack_seen = True
            continue
        sides = {}
        for owner, _ in owners(name, module):
            early, late = called.get(owner, (False, False))
            sides[owner] = (early, late) if early or late else (not stack_seen, stack_seen)
        if len(set(sides.values())) == 1:
            sides = {name: next(iter(sides.values()))}
        before += [n for n, (early, _) in sides.items() if early]
        after += [n for n, (_, late) in sides.items() if late]
    return Anatomy(stack, len(model.get_submodule(stack)), tuple(before), tuple(after))


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
