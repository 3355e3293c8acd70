"""What a model says of itself: numbers from the config of its decoder, and its embedding."""

from __future__ import annotations

from typing import Any

from torch import nn


def config_value(model: nn.Module, name: str) -> Any:
    """What the config of the model's decoder says, or None where it says nothing or says it per layer."""
    config = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    try:
        return getattr(config, name, None)
    except Exception:  # a value per layer is refused in the config's own way
        return None


def input_embeddings(model: Any) -> nn.Module | None:
    """The embedding of a model's ids; None for one without, which transformers answers with an error (CLIP's tower)."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
