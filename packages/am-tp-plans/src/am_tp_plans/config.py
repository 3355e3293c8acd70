"""Numbers from the config of a model's decoder."""

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
