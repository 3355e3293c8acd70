"""Under sequence parallelism the hidden states between layers are parts of the sequence, and nobody is to read them."""

from __future__ import annotations

from typing import Any

from torch import nn


def refuse_hidden_states(model: nn.Module) -> None:
    """Let a model whose sequence is sharded between its layers refuse to return what is between them.

    Every module with layers in it is told, the model and the decoder in it, since each may be called by itself.

    Raises, at a forward, on every rank alike and before anything runs:
        ValueError: `output_hidden_states` is asked for, by the call or by the config.
    """
    for module in model.modules():
        if hasattr(module, "config") and any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
            module.register_forward_pre_hook(_refuse, with_kwargs=True)


def _refuse(module: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_hidden_states")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_hidden_states", False)
    if asked:
        raise ValueError(
            f"output_hidden_states=True of {type(module).__name__}: with sequence parallelism the hidden states "
            "between layers are one rank's part of the sequence; use a plan without sequence parallelism to read them"
        )
