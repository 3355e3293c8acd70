"""Which modules a cut moves as one piece: the layers, and the outermost modules with parameters beside them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# They have no forward: code calls what they hold.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Units:
    """The unit that every module of a model belongs to, by its full name.

    Modules above the stacks of layers, containers and modules without parameters belong to none: what they do is the
    model's code between units, which runs on every stage. Between two stacks dropout is a unit, too: all layers of the
    second read what it returns, and it must be drawn once.

    Args:
        model: the whole model.
        stacks: full names of its stacks of layers, in the order in which they run.
        opened: full names of modules whose children are units, not they themselves.
    """

    def __init__(self, model: nn.Module, stacks: Iterable[str], opened: Iterable[str] = ()) -> None:
        self.stacks, self.opened = tuple(stacks), frozenset(opened)
        self.names: list[str] = []
        self._of: dict[str, str | None] = {"": None}
        layers = [f"{stack}.{name}" for stack in self.stacks for name, _ in model.get_submodule(stack).named_children()]
        self._index = {layer: index for index, layer in enumerate(layers)}
        for name, module in model.named_modules(remove_duplicate=False):
            if not name:
                continue
            above = self._of.get(name.rpartition(".")[0])
            if above is not None:
                self._of[name] = above
            elif self._is_unit(name, module):
                self._of[name] = name
                self.names.append(name)
            else:
                self._of[name] = None

    def of(self, name: str) -> str | None:
        """The unit of a module, or of the module that holds it where it is a parameter list."""
        return self._of.get(name)

    def is_layer(self, unit: str) -> bool:
        return unit.startswith(tuple(f"{stack}." for stack in self.stacks))

    def layers_in(self, units: Iterable[str]) -> list[int]:
        """The layers among units, by their places in all stacks together."""
        return [self._index[unit] for unit in units if unit in self._index]

    def _is_unit(self, name: str, module: nn.Module) -> bool:
        if name in self.opened or any(stack == name or stack.startswith(f"{name}.") for stack in self.stacks):
            return False
        if isinstance(module, _CONTAINERS) and not self.is_layer(name):
            return False
        if len(self.stacks) > 1 and isinstance(module, nn.Dropout):
            return True
        return next(module.parameters(), None) is not None
