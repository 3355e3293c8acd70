"""What crosses a cut: the stand-ins for modules that a stage does not hold, and the hooks on its root.

A stage keeps the model's own forward. The layers it does not hold are stand-ins that hand their input on; the
hidden state enters and leaves the stage through them::

    stage 0   embed  L0  L1 [S2] S3  S4  S5  -    -        S2 keeps its input: that is what the stage sends
    stage 1   zeros  S0 [S1] L2  L3 [S4] S5  -    -        S1 returns what the stage received, S4 keeps its input
    stage 2   zeros  S0  S1  S2 [S3] L4  L5  norm head     S3 returns what the stage received

What runs before the stack on a later stage (masks, position ids, rotary tables) sees zeros of the right shape and
dtype; nothing of it but those side inputs reaches a held layer, so it gets no gradient and needs no parameters.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


class Boundary:
    """The hidden state on its way in and out of one stage, for the microbatch that is running.

    Attributes:
        sequence_dim: which dim of the hidden state is the sequence.
        fill: what an absent embedding returns at the token after the first; k times that at the k-th after it.
        expected: `(shape, dtype)` of what this stage sends, agreed with the next stage; None before that.
    """

    def __init__(self, is_first: bool, is_last: bool, batch_dim: int, sequence_dim: int) -> None:
        self.is_first = is_first
        self.is_last = is_last
        self.batch_dim = batch_dim
        self.sequence_dim = sequence_dim
        self.fill = 0.0
        self.received: torch.Tensor | None = None
        self.sent: torch.Tensor | None = None
        self.expected: tuple[tuple[int, ...], torch.dtype] | None = None

    def install(self, part: nn.Module) -> None:
        """Adapt the part's call: a stage takes ids or a hidden state and returns a tensor."""
        part.register_forward_pre_hook(self._enter, with_kwargs=True)
        part.register_forward_hook(self._leave)

    def _enter(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Training never reads a key-value cache, and a stage would fill only its own layers of it.
        if "use_cache" in inspect.signature(part.forward).parameters:
            kwargs.setdefault("use_cache", False)
        if self.is_first:
            return args, kwargs
        self.received, *rest = args
        if "input_ids" not in kwargs and "inputs_embeds" not in kwargs:
            shards = getattr(part, "sequence_shards", 1)
            batch = self.received.shape[self.batch_dim]
            length = self.received.shape[self.sequence_dim] * shards
            kwargs["input_ids"] = torch.zeros(batch, length, dtype=torch.int64, device=self.received.device)
        return tuple(rest), kwargs

    def _leave(self, part: nn.Module, args: tuple, output: Any) -> torch.Tensor:
        sent, self.received, self.sent = self.sent, None, None
        if self.is_last:
            return _logits(output)
        if sent is None:
            raise RuntimeError(f"{type(part).__name__} returned without running its decoder layers")
        return self._as_agreed(sent)

    def _as_agreed(self, sent: torch.Tensor) -> torch.Tensor:
        if self.expected is None:
            return sent
        shape, dtype = self.expected
        if tuple(sent.shape) != shape or torch.promote_types(sent.dtype, dtype) != dtype:
            raise RuntimeError(
                f"this stage produced a hidden state of shape {tuple(sent.shape)}, {sent.dtype}, but the next stage "
                f"expects {shape}, {dtype}; if a parallelize_fn shards the sequence between layers it must set "
                "`sequence_shards` on the part"
            )
        return sent.to(dtype)


class AbsentLayer(nn.Module):
    """Stands where a decoder layer was that another stage holds; hands its input on.

    Plain attributes of the layer (its attention type, its index) stay readable, because model code reads them.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        for name, value in vars(layer).items() if layer is not None else ():
            if not name.startswith("_") and isinstance(value, (str, int, float, bool, type(None))):
                setattr(self, name, value)
        self.returns_tuple = False
        self.boundary: Boundary | None = None
        self.receives = False
        self.sends = False

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        hidden: Any = hidden_state_of(args, kwargs)
        if self.boundary is not None:
            if self.sends:
                self.boundary.sent = hidden
            if self.receives:
                hidden = self.boundary.received
        return (hidden,) if self.returns_tuple else hidden


class AbsentEmbedding(nn.Module):
    """Stands where an embedding was: zeros (unless filled) of the shape and dtype the real one would return."""

    def __init__(self, embedding_dim: int, boundary: Boundary) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.boundary = boundary

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        received = self.boundary.received
        dtype = torch.get_default_dtype() if received is None else received.dtype
        ramp = torch.arange(ids.shape[-1], dtype=dtype, device=ids.device) * self.boundary.fill
        return ramp[:, None].expand(*ids.shape, self.embedding_dim)


class AbsentModule(nn.Module):
    """Stands where any other module with parameters was (a norm, a head, an encoder); hands its input on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return hidden_state_of(args, kwargs)


def hidden_state_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state in a layer call: the first positional argument, or `hidden_states=`."""
    return args[0] if args else kwargs["hidden_states"]


def _logits(output: Any) -> torch.Tensor:
    """The tensor a last stage returns: logits where the model has a head, the last hidden state where it has none."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    return output[0]
