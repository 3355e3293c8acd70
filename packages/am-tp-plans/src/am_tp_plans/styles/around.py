"""What a style does to the hidden state on a module's way in and out, by its class.

Not by hooks: `torch.compile` knows a hook by a number of its own, and would compile every layer of a model anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from am_tp_styles.classes import put_over

Change = Callable[[torch.Tensor], torch.Tensor]
ChangeWithInput = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def change_input(module: nn.Module, change: Change, afterwards: Callable[[torch.Tensor], None] | None = None) -> None:
    """Change the hidden state that a module is called with: its first argument, or `hidden_states`.

    Args:
        module: gets a class that does it, and keeps the functions, which hold no module and can be pickled.
        change: from the hidden state to what the module sees.
        afterwards: called with that when the module has returned or raised.
    """
    _around(module, "input_changes", (change, afterwards))


def change_argument(module: nn.Module, name: str, position: int, change: Change) -> None:
    """Change another argument that a module is called with, by its name or in its position; None stays None."""
    _around(module, "argument_changes", (name, position, change))


def change_output(module: nn.Module, change: Change) -> None:
    """Change the hidden state that a module returned: the tensor itself, or the first of a tuple."""
    _around(module, "output_changes", (change, False))


def change_output_like_input(module: nn.Module, change: ChangeWithInput) -> None:
    """As `change_output`, with a function of the hidden state that the module returned and the one that it saw."""
    _around(module, "output_changes", (change, True))


def _around(module: Any, which: str, change: Any) -> None:
    for name in ("input_changes", "argument_changes", "output_changes"):
        if name not in vars(module):
            setattr(module, name, ())
    setattr(module, which, (*getattr(module, which), change))
    put_over(module, _Around)


class _Around:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for change, _ in self.input_changes:
            if args:
                args = (change(args[0]), *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": change(kwargs["hidden_states"])}
        for name, position, change in self.argument_changes:
            if len(args) > position:
                args = (*args[:position], _changed(args[position], change), *args[position + 1 :])
            elif name in kwargs:
                kwargs = kwargs | {name: _changed(kwargs[name], change)}
        try:
            output = super().forward(*args, **kwargs)
        finally:
            for _, afterwards in self.input_changes:
                if afterwards is not None:
                    afterwards(args[0] if args else kwargs["hidden_states"])
        for change, with_input in self.output_changes:
            seen = ((args[0] if args else kwargs["hidden_states"]),) if with_input else ()
            output = (change(output[0], *seen), *output[1:]) if isinstance(output, tuple) else change(output, *seen)
        return output


def _changed(value: torch.Tensor | None, change: Change) -> torch.Tensor | None:
    return None if value is None else change(value)
