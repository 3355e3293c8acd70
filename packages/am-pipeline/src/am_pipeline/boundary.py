"""What crosses a cut: the stand-ins for modules that a stage does not hold, and the hooks on its root.

A stage keeps the model's own forward. The layers it does not hold are stand-ins that hand their input on; the
hidden state enters and leaves the stage through them::

    stage 0   embed  L0  L1 [S2] S3  S4  S5  -    -        S2 keeps its input: that is what the stage sends
    stage 1   dummy  S0 [S1] L2  L3 [S4] S5  -    -        S1 returns what the stage received, S4 keeps its input
    stage 2   dummy  S0  S1  S2 [S3] L4  L5  norm head     S3 returns what the stage received

What runs before the stack on a later stage (masks, position ids, rotary tables) sees dummies of the right shape and
dtype. Where a layer or the head needs more of the prologue than that (per-layer embeddings, the embedded ids once
more), the output of the module in question travels along with the hidden state, and its stand-in returns it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from am_pipeline._torch_compat import is_view
from am_pipeline.inputs import ENCODER_INPUTS

# Stands for all layers where stand-ins are named.
LAYERS = "<layers>"


@dataclass
class Boundary:
    """The hidden state on its way in and out of one stage, for the microbatch that is running.

    Attributes:
        is_first, is_last: where the stage is.
        batch_dim, sequence_dim: dims of the hidden state.
        returned: how many values a layer returns as a tuple; 0 for a bare tensor.
        traveling: names of the modules before the stack whose outputs later stages need.
        needs_ids: whether later stages need the real ids.
        narrow: whether what follows the last held layer may run on one token, since nobody reads it.
        last: index, result and its version of the absent layer that ran last.
        expected: `(shape, dtype)` of each tensor that this stage sends, agreed with the next; None before that.
        received, sent, aside: the microbatch's hidden state in and out, and the outputs that travel, by name.
        fill: changes the dummies of the named stand-ins, when a model is rehearsed.
        extra: what absent layers return beside the hidden state: nothing, or a mark when a model is rehearsed.
        calls: the stand-ins called so far, when a model is rehearsed.
    """

    is_first: bool
    is_last: bool
    batch_dim: int = 0
    sequence_dim: int = 1
    returned: int = 0
    traveling: tuple[str, ...] = ()
    needs_ids: bool = False
    narrow: bool = True
    last: tuple[int, torch.Tensor, int] | None = None
    expected: list[tuple[tuple[int, ...], torch.dtype]] | None = None
    received: torch.Tensor | None = None
    sent: torch.Tensor | None = None
    aside: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: torch.Tensor | None = None
    fill: dict[str, float] = field(default_factory=dict)
    calls: list[str] | None = None

    def install(self, part: nn.Module) -> None:
        """Adapt the part's call: a stage takes ids or what the stage before it sent, and returns what it sends."""
        part.register_forward_pre_hook(self._enter, with_kwargs=True)
        part.register_forward_hook(self._leave)
        if self.is_first:
            for name in self.traveling:
                part.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str):
        def keep(_module: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            # Some embeddings return one row for the whole batch; what travels has the batch dim.
            shape = self.expected[1 + self.traveling.index(name)][0] if self.expected else output.shape
            self.aside[name] = output.expand(shape).contiguous()

        return keep

    def _enter(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Training never reads a key-value cache, and a stage would fill only its own layers of it.
        if "use_cache" in inspect.signature(part.forward).parameters:
            kwargs.setdefault("use_cache", False)
        if self.is_first:
            if args:
                kwargs.pop("input_ids", None)  # shared with later stages that this rank may hold too
            return args, kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in ENCODER_INPUTS}
        self.received, *rest = args
        for name in self.traveling:
            self.aside[name] = _Received.apply(rest[0])
            rest = rest[1:]
        if "input_ids" not in kwargs:
            if self.needs_ids:
                raise ValueError(
                    f"{type(part).__name__} needs the ids on every stage: call the part with input_ids= too "
                    "(a schedule built by this package does it)"
                )
            shards = getattr(part, "sequence_shards", 1)
            batch = self.received.shape[self.batch_dim]
            length = self.received.shape[self.sequence_dim] * shards
            kwargs["input_ids"] = torch.zeros(batch, length, dtype=torch.int64, device=self.received.device)
        return tuple(rest), kwargs

    def _leave(self, part: nn.Module, args: tuple, output: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        sent, aside = self.sent, self.aside
        self.received, self.sent, self.last, self.aside = None, None, None, {}
        if self.is_last:
            return _logits(output)
        if sent is None:
            raise RuntimeError(f"{type(part).__name__} returned without running its decoder layers")
        outputs = [sent, *(aside[name] for name in self.traveling)]
        # A backward in two passes detaches what was sent in place, which a view does not allow.
        outputs = [tensor.clone() if is_view(tensor) else tensor for tensor in outputs]
        if self.expected is not None:
            outputs = [self._as_agreed(*pair) for pair in zip(outputs, self.expected, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def changed_since(self, index: int, hidden: torch.Tensor) -> bool:
        """Whether this is not what the stand-in of the layer `index` returned, if that was the last to run."""
        if self.last is None or self.last[0] != index:
            return False
        # Backward hooks on modules hand on another tensor over the same memory.
        before = self.last[1]
        moved = hidden.data_ptr() != before.data_ptr() or hidden.shape != before.shape
        return moved or hidden._version != self.last[2]

    @staticmethod
    def _as_agreed(sent: torch.Tensor, expected: tuple[tuple[int, ...], torch.dtype]) -> torch.Tensor:
        shape, dtype = expected
        if tuple(sent.shape) != shape or torch.promote_types(sent.dtype, dtype) != dtype:
            raise RuntimeError(
                f"this stage produced a hidden state of shape {tuple(sent.shape)}, {sent.dtype}, but the next stage "
                f"expects {shape}, {dtype}; if a parallelize_fn shards the sequence between layers it must set "
                "`sequence_shards` on the part"
            )
        return sent.to(dtype)


class _Received(torch.autograd.Function):
    """The same values; the gradient is contiguous, as messages have to be."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor) -> torch.Tensor:
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0].contiguous()


class _Absent(nn.Module):
    """A stand-in without parameters. What model code reads of the original, other than tensors, stays readable."""

    def __init__(self, original: nn.Module, boundary: Boundary) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training" and not isinstance(value, (torch.Tensor, nn.Module)):
                self.__dict__[name] = value
        self.__dict__["_kind"] = type(original)
        self.__dict__["_inner"] = {name: _Absent(child, boundary) for name, child in original.named_children()}
        self.__dict__["_tensors"] = {n: (p.shape, p.dtype) for n, p in original.named_parameters(recurse=False)}
        self.__dict__["boundary"] = boundary

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_inner", {})
        if name in inner:
            return inner[name]
        tensors = self.__dict__.get("_tensors", {})
        if name in tensors:
            return self._poison(name, *tensors[name])
        inherited = getattr(self.__dict__.get("_kind"), name, None)
        if isinstance(inherited, property) and inherited.fget is not None:
            return inherited.fget(self)
        if inherited is not None and not callable(inherited):
            return inherited
        return super().__getattr__(name)

    def _poison(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Code may ask for the dtype or shape of a parameter that is elsewhere; its values are no number."""
        received = self.boundary.received
        value = float("nan") if dtype.is_floating_point else 0
        return torch.full((), value, dtype=dtype, device=received.device if received is not None else "cpu").expand(
            shape
        )


class AbsentLayer(_Absent):
    """Stands where a decoder layer was that another stage holds; hands its input on."""

    def __init__(self, layer: nn.Module, index: int, boundary: Boundary) -> None:
        super().__init__(layer, boundary)
        self.index = index
        self.receives = False
        self.sends = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Any = hidden_state_of(args, kwargs)
        boundary = self.boundary
        if boundary.calls is None and boundary.changed_since(self.index - 1, hidden):
            raise RuntimeError(
                f"with these inputs the forward changes the hidden state between layers ({self._kind.__name__}) that "
                "this stage does not hold (vision features added to early layers, for example): "
                "put those layers on the first stage"
            )
        if self.sends:
            boundary.sent = hidden
            if boundary.narrow:
                hidden = hidden.narrow(boundary.sequence_dim, 0, 1)
        if boundary.calls is not None:
            hidden = dummy(hidden.shape, hidden.dtype, hidden.device, boundary.fill.get(LAYERS, 1.0))
        if self.receives:
            hidden = boundary.received
        boundary.last = (self.index, hidden, hidden._version)
        if not boundary.returned:
            return hidden
        return (hidden, *(boundary.extra for _ in range(boundary.returned - 1)))


class AbsentModule(_Absent):
    """Stands where any other module with parameters was: a dummy of the shape and dtype that it would return."""

    def __init__(self, original: nn.Module, name: str, boundary: Boundary) -> None:
        super().__init__(original, boundary)
        self.__dict__["_name"] = name
        self.__dict__["_embeds"] = isinstance(original, nn.Embedding)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        boundary = self.boundary
        if boundary.calls is not None:
            boundary.calls.append(self._name)
        if self._name in boundary.aside and not boundary.is_first:
            return boundary.aside[self._name]
        return self._dummy(args, kwargs)

    def _dummy(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """It depends on nothing but the shape, because a later stage has nothing else."""
        received = self.boundary.received
        value = next(tensors_in((args, kwargs)), None)
        shape = tuple(value.shape if value is not None else args[0])  # some embeddings take the shape of the ids
        width = self.__dict__.get("out_features", self.__dict__.get("nf"))
        if self._embeds:
            shape = (*shape, self.embedding_dim)
        elif width is not None and value is not None and not value.is_floating_point():
            shape = (*shape, width)  # an embedding with an adapter
        elif width is not None:
            shape = (*shape[:-1], width)
        device = value.device if value is not None else received.device if received is not None else "cpu"
        dtype = torch.get_default_dtype() if received is None else received.dtype
        return dummy(shape, dtype, device, self.boundary.fill.get(self._name, 1.0))


def dummy(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, fill: float) -> torch.Tensor:
    """Numbers between 0.5 and 1.5, all over the place, other ones for another `fill`."""
    wave = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
    return (1 + 0.5 * torch.sin(wave * fill)).view(tuple(shape)).to(dtype)


def hidden_state_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden state in a layer call: the first positional argument, or `hidden_states=`."""
    return args[0] if args else kwargs["hidden_states"]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _logits(output: Any) -> torch.Tensor:
    """The tensor a last stage returns: logits where the model has a head, the last hidden state where it has none."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            return value
    return output[0]
