"""Which modules a cut moves as one piece: the layers, and the outermost modules with parameters beside them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# They have no forward: code calls what they hold.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class Units:
    """The unit that every module of a model belongs to, by its full name.

    Modules above the stack of layers, containers and modules without parameters belong to none: what they do is the
    model's code between units, which runs on every stage.

    Args:
        model: the whole model.
        stack: full name of its stack of layers.
        opened: full names of modules whose children are units, not they themselves.
    """

    def __init__(self, model: nn.Module, stack: str, opened: Iterable[str] = ()) -> None:
        self.stack, self.opened = stack, frozenset(opened)
        self.names: list[str] = []
        self._of: dict[str, str | None] = {"": None}
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
        return unit.startswith(f"{self.stack}.")

    def _is_unit(self, name: str, module: nn.Module) -> bool:
        if name == self.stack or self.stack.startswith(f"{name}.") or name in self.opened:
            return False
        if isinstance(module, _CONTAINERS) and not self.is_layer(name):
            return False
        return next(module.parameters(), None) is not None
