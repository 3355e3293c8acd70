"""Find the decoder stack of a model by structure, without knowing the model by name."""

from __future__ import annotations

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
        after: full names of the modules with parameters that run after it (final norm, head).
    """

    stack: str
    num_layers: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    def layer(self, index: int) -> str:
        return f"{self.stack}.{index}"


def find_anatomy(model: nn.Module) -> Anatomy:
    """Locate the decoder stack and sort the other modules into before and after it.

    The stack is the `ModuleList` whose length is the layer count of `model.config` (or, where there is no config,
    the one with most parameters); lists nested in another list, such as experts in a layer, do not count.
    A module that is registered before the stack, or is an embedding, runs before it.

    Raises:
        ValueError: no such list, or several.
    """
    stack = _find_stack(model)
    before, after = [], []
    seen_stack = False
    for name, module in _modules_beside(model, stack):
        if name == stack:
            seen_stack = True
        elif any(True for _ in module.parameters()):
            early = not seen_stack or isinstance(module, nn.Embedding)
            (before if early else after).append(name)
    return Anatomy(stack, len(model.get_submodule(stack)), tuple(before), tuple(after))


def _find_stack(model: nn.Module) -> str:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(any(True for _ in layer.parameters()) for layer in module)
    }
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    count = _layer_count(model)
    if count is not None:
        lists = {n: m for n, m in lists.items() if len(m) == count}
    if not lists:
        expected = "" if count is None else f" of the {count} layers its config names"
        raise ValueError(f"{type(model).__name__} has no ModuleList{expected}: there is no decoder stack to cut")
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    largest = max(sizes.values())
    winners = [name for name, size in sizes.items() if size == largest]
    if len(winners) > 1:
        raise ValueError(
            f"{type(model).__name__} has several stacks of the same size, {winners}; "
            "name the modules of each stage yourself with module_names_per_stage"
        )
    return winners[0]


def _layer_count(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in _LAYER_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int):
            return count
    return None


def _modules_beside(model: nn.Module, stack: str):
    """The outermost modules that are not ancestors of the stack, and the stack itself, in order of registration."""
    ancestors = {stack.rsplit(".", depth)[0] for depth in range(1, stack.count(".") + 1)}

    def walk(module: nn.Module, prefix: str):
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in ancestors:
                yield from walk(child, f"{full}.")
            else:
                yield full, child

    yield from walk(model, "")
