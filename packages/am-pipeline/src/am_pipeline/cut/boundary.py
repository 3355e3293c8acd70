"""What crosses a cut while a part runs: the stand-ins for units that a stage does not hold, and the hooks on its root.

A stage keeps the model's own forward. Units that it does not hold are stand-ins. A value that the stage was sent is
what its stand-in returns; what the stage sends is taken from the unit that made it, or where it reaches a stand-in::

    stage 0   embed  L0 [L1] S2  S3  S4  S5  -    -        what L1 returned is what the stage sends
    stage 1   dummy  S0 [S1] L2 [L3] S4  S5  -    -        S1 returns what the stage received
    stage 2   dummy  S0  S1  S2 [S3] L4  L5  norm head     S3 returns what the stage received

All other stand-ins return tensors of the right shape that hold no numbers: NaN. The cut has proved that nothing that
counts on this stage reads them. A stand-in that is called when the cut did not foresee it raises.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from am_pipeline._torch_compat import after_each_call, is_view
from am_pipeline.cut.crossing import IMAGES, Crossed, Shape, Sizes
from am_pipeline.cut.messages import Message
from am_pipeline.cut.provenance import Argument, Tracer, Value, leaves_of
from am_pipeline.nested import map_leaves, tensors_in
from am_pipeline.step.inputs import decoder_length, images_length


class Missing:
    """A tensor that an absent unit would return: what was received for it, or no numbers."""

    def __init__(self, value: Value, shape: Shape | None, small: tuple[int, ...], dtype, of_layer: bool, written: bool):
        self.value, self.shape, self.small, self.dtype = value, shape, small, dtype
        self.of_layer, self.written = of_layer, written


@dataclass(frozen=True)
class Passage:
    """What one stage gets, sends and leaves out, for one form of input. Plain data.

    Attributes:
        receives, sends: the tensors that enter and leave, in order.
        returns: for every call of a unit that is absent, what its stand-in returns.
        made: by call of a held unit, which of the tensors it returns are values to send: `(place, value)`.
        narrow: calls of absent units after which nothing counts; their tokens may be one.
        first_input: name, shape and dtype of the model's first argument.
        needs: inputs that the stage depends on.
        withheld: inputs that later stages are not given: the units that read them are on the first.
        of_images: whether it was proved at two numbers of images.
        runs: the units that the stage holds and runs, in order, each once.
    """

    receives: tuple[Crossed, ...]
    sends: tuple[Crossed, ...]
    returns: Mapping[tuple[str, int], Any]
    made: Mapping[tuple[str, int], tuple[tuple[int, Value], ...]]
    narrow: frozenset[tuple[str, int]]
    first_input: tuple[str, Shape, torch.dtype]
    needs: frozenset[str]
    withheld: frozenset[str] = frozenset()
    of_images: bool = False
    runs: tuple[str, ...] = ()


@dataclass
class Boundary:
    """The values on their way in and out of one stage, for the microbatch that is running.

    Attributes:
        is_first, is_last: where the stage is.
        passage: what the stage gets, sends and leaves out.
        chosen: the passage of the microbatch that runs, where a schedule says which it is.
        prove: for a part that is called by hand: `(first argument, other inputs, sizes, training)` to the passage of
            such a call.
        receiving, sending: the messages of the microbatch that runs, agreed with the stages beside; None before that.
        passes_on: stand-ins hand their input on, for a forward that was written for stages by hand.
        watch: follows the values, when a part is proved.
    """

    is_first: bool
    is_last: bool
    passage: Passage
    chosen: Passage | None = None
    prove: Callable[[torch.Tensor | None, dict[str, Any], Sizes, bool], Passage] | None = None
    receiving: Message | None = None
    sending: Message | None = None
    passes_on: bool = False
    watch: Tracer | None = None
    _names: tuple[str, ...] = ()
    _active: bool = False
    _with_gradients: bool = False
    _hooked: set[str] = field(default_factory=set)
    _counts: Counter[str] = field(default_factory=Counter)
    _received: dict[Value, torch.Tensor] = field(default_factory=dict)
    _to_send: dict[Value, torch.Tensor] = field(default_factory=dict)
    _sizes: Sizes = (0, 0)
    _shards: int = 1
    _whole: tuple[str, ...] = ()
    _device: torch.device | str = "cpu"

    @property
    def device(self) -> torch.device | str:
        """Where the microbatch that runs is."""
        return self._device

    def install(self, part: nn.Module) -> None:
        """Adapt the part's call: a stage takes ids or what the stage before it sent, and returns what it sends."""
        part.register_forward_pre_hook(self._enter, with_kwargs=True)
        part.register_forward_hook(self._leave)

    @property
    def called(self) -> Counter[str]:
        """How often the last forward called each stand-in."""
        return self._counts

    def stand_in(self, unit: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What an absent unit returns to the code that calls it."""
        if self.passes_on:
            return args[0] if args else kwargs["hidden_states"]
        if not self._active:
            raise RuntimeError(
                f"{unit} is on another stage, and was called outside of its part's forward: a checkpoint around "
                "several layers runs them again in backward; recompute layer by layer"
            )
        call = (unit, self._counts[unit])
        self._counts[unit] += 1
        if call not in self.passage.returns:
            raise RuntimeError(
                f"with these inputs the forward calls {unit} (call {call[1] + 1}), which is on another stage; it did "
                "not when the model was cut"
            )
        arguments = list(leaves_of((args, kwargs)))

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Argument):
                return arguments[leaf.position]
            return self._fill(leaf, call) if isinstance(leaf, Missing) else leaf

        return map_leaves(self.passage.returns[call], fill)

    def _fill(self, leaf: Missing, call: tuple[str, int]) -> torch.Tensor:
        if leaf.value in self._received:
            if self._with_gradients and not torch.is_grad_enabled() and self._crossed(leaf.value).requires_grad:
                raise RuntimeError(_hidden(leaf.value))
            return self._received[leaf.value]
        batch, *lengths = self._sizes
        shards = self._shards if is_sharded(leaf, self._whole) else 1
        tokens = [1 if call in self.passage.narrow else length // shards for length in lengths[:2]]
        shape = leaf.small if leaf.shape is None else leaf.shape.at((batch, *tokens, *lengths[2:]))
        if self.watch is not None:
            return self.watch.absent(call[0], shape, leaf.dtype)
        dtype = leaf.dtype
        if self.passage.receives and dtype == self.passage.receives[0].dtype:  # the part may compute in another
            dtype = next(iter(self._received.values())).dtype
        empty = no_numbers(shape, dtype, self._device)
        return empty.clone() if leaf.written else empty

    def _enter(self, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # Training never reads a key-value cache, and a stage would fill only its own layers of it.
        self._names = names = self._names or tuple(inspect.signature(part.forward).parameters)
        if "use_cache" in names:
            kwargs.setdefault("use_cache", False)
        self._shards, self._whole = getattr(part, "sequence_shards", 1), getattr(part, "whole_outputs", ())
        self.passage = self.chosen or self.passage
        name = self.passage.first_input[0]
        count = 0 if self.is_first else len(self.receiving.slots if self.receiving else self.passage.receives)
        received, args = args[:count], args[count:]
        if count and self.receiving:
            received = self.receiving.unpack(received)
        kwargs |= zip(names, args, strict=False)
        first = kwargs.get(name)
        seen = received[0] if received else first if first is not None else next(tensors_in(kwargs), None)
        if seen is None:
            raise ValueError(f"the first stage of {type(part).__name__} must be called with {name}")
        self._device = seen.device
        self._sizes = self._sizes_of(received, first if received else seen, kwargs)
        if self.chosen is None and self.prove is not None:
            others = {n: value for n, value in kwargs.items() if n not in (name, "use_cache")}
            self.passage = self.prove(first, others, self._sizes, part.training)
        self._hook(part)
        self._counts.clear()
        self._received, self._to_send = {}, {}  # of a forward that failed
        self._active, self._with_gradients = True, torch.is_grad_enabled()
        if self.is_first:
            return ((kwargs.pop(name),), kwargs) if name in kwargs else ((), kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in self.passage.withheld}
        for crossed, tensor in zip(self.passage.receives, received, strict=True):
            tensor = _Received.apply(tensor) if tensor.requires_grad and self.watch is None else tensor
            self._received[crossed.value] = self._copied(tensor) if crossed.written else tensor
            self._to_send[crossed.value] = tensor
        if name not in kwargs:
            if name in self.passage.needs:
                raise ValueError(
                    f"{type(part).__name__} needs the ids on every stage: call the part with {name}= too "
                    "(a schedule built by this package does it)"
                )
            _, shape, dtype = self.passage.first_input
            kwargs[name] = no_numbers(shape.at(self._sizes), dtype, self._device)
        return (kwargs.pop(name),), kwargs

    def _leave(self, part: nn.Module, args: tuple, output: Any) -> Any:
        to_send = self._to_send
        self._received, self._to_send, self._active = {}, {}, False
        missing = [unit for unit, call in self.passage.returns if self._counts[unit] <= call]
        if missing and not self.passes_on and self.watch is None:
            raise RuntimeError(
                f"with these inputs the forward does not call {missing[0]}, as it did when the model was cut: what it "
                "runs may not depend on the numbers in its inputs"
            )
        if self.is_last:
            return select_output(output)
        outputs = []
        for place, crossed in enumerate(self.passage.sends):
            tensor = to_send.get(crossed.value)
            if tensor is None:
                raise RuntimeError(f"{type(part).__name__} did not compute {crossed.value}, which later stages need")
            if self.watch is not None:
                outputs.append(tensor)
                continue
            self._refuse_hidden(crossed, tensor)
            outputs.append(self._as_agreed(tensor, *self.sending.own[place], crossed) if self.sending else tensor)
        if self.watch is None:
            # A backward in two passes detaches what was sent in place, which a view does not allow.
            outputs = [tensor.contiguous() for tensor in (self.sending.pack(outputs) if self.sending else outputs)]
            outputs = [tensor.clone() if is_view(tensor) else tensor for tensor in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _hook(self, part: nn.Module) -> None:
        """Take what held units return, after everything that was installed on them since the part was built."""
        for unit in {unit for unit, _ in self.passage.made} - self._hooked:
            after_each_call(part.get_submodule(unit), partial(self._made, unit))
            self._hooked.add(unit)

    def _made(self, unit: str, output: Any) -> None:
        if not self._active:
            return
        call = (unit, self._counts[unit])
        self._counts[unit] += 1
        for place, value in self.passage.made.get(call, ()):
            self._take(value, list(tensors_in(output))[place])

    def _take(self, value: Value, tensor: torch.Tensor) -> None:
        crossed = self._crossed(value)
        self._to_send[value] = self._copied(tensor) if crossed.written else tensor

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self.watch is None else self.watch.copy(tensor)

    def _refuse_hidden(self, crossed: Crossed, tensor: torch.Tensor) -> None:
        if self._with_gradients and crossed.requires_grad and crossed.written and not tensor.requires_grad:
            raise RuntimeError(_hidden(crossed.value))

    def _crossed(self, value: Value) -> Crossed:
        return next(c for c in (*self.passage.sends, *self.passage.receives) if c.value == value)

    def _sizes_of(
        self, received: tuple[torch.Tensor, ...], first: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> Sizes:
        """The sizes of a microbatch: what arrives tells them, or the inputs; a cut refuses what neither does."""

        def told(place: int) -> int | None:
            if first is not None and place < 2:
                return first.shape[place]
            for crossed, tensor in zip(self.passage.receives, received, strict=True):
                size = crossed.shape.size_in(place, tuple(tensor.shape))
                if size is not None:
                    return size * (self._shards if is_sharded(crossed, self._whole) and place else 1)
            return None

        batch, length, of_decoder = map(told, range(3))
        if batch is None:
            raise RuntimeError("no tensor between the stages tells the batch size")
        of_decoder = next(iter(decoder_length(kwargs)), of_decoder)
        if self.passage.of_images:
            crossing = (*self.passage.receives, *self.passage.sends)
            images = images_length(kwargs) if any(IMAGES.of[0] in c.shape.sizes for c in crossing) else None
            return batch, length or 1, of_decoder or 0, images or told(3) or 1
        return batch, length or 1, *(() if of_decoder is None else (of_decoder,))

    @staticmethod
    def _as_agreed(sent: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, crossed: Crossed) -> torch.Tensor:
        if tuple(sent.shape) != shape or torch.promote_types(sent.dtype, dtype) != dtype:
            raise RuntimeError(
                f"this stage sends {crossed.value} of shape {tuple(sent.shape)}, {sent.dtype}, but the next stage "
                f"expects {shape}, {dtype}; {_why(crossed)}"
            )
        return sent.to(dtype)


def is_sharded(value: Missing | Crossed, whole: tuple[str, ...]) -> bool:
    """Whether the tokens of a value are sharded where layers shard theirs, but for those of some layers."""
    return value.of_layer and value.value.unit not in whole


def _why(crossed: Crossed) -> str:
    if IMAGES.of[0] in crossed.shape.sizes:
        return (
            "the images of a step must give as many tokens each as those of `example_inputs` do, as what a tower that "
            "is cut sends has them: pad or resize them alike, or leave the tower whole on the first stage (no "
            "`example_inputs`)"
        )
    return (
        "if a parallelize_fn shards the sequence between layers it must set `sequence_shards` on the part, and "
        "`whole_outputs` where it gathers what a layer returns"
    )


class _Received(torch.autograd.Function):
    """The same values; the gradient is contiguous, as messages have to be."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor) -> torch.Tensor:
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0].contiguous()


class Absent(nn.Module):
    """A stand-in without parameters. What model code reads of the original, other than tensors, stays readable."""

    def __init__(self, original: nn.Module, name: str, boundary: Boundary) -> None:
        super().__init__()
        for key, value in vars(original).items():
            if not key.startswith("_") and key != "training" and not isinstance(value, (torch.Tensor, nn.Module)):
                self.__dict__[key] = value
        self.__dict__["_name"] = name
        self.__dict__["_kind"] = type(original)
        self.__dict__["_inner"] = {n: _absent(child, f"{name}.{n}", boundary) for n, child in original.named_children()}
        self.__dict__["_tensors"] = {n: (p.shape, p.dtype) for n, p in original.named_parameters(recurse=False)}
        self.__dict__["boundary"] = boundary
        if isinstance(getattr(type(original), "dtype", None), property) and any(True for _ in original.parameters()):
            self.__dict__["dtype"] = original.dtype  # which transformers reads of the parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.boundary.stand_in(self._name, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_inner", {})
        if name in inner:
            return inner[name]
        tensors = self.__dict__.get("_tensors", {})
        if name in tensors:  # code may ask for the dtype or shape of a parameter that is elsewhere
            shape, dtype = tensors[name]
            return no_numbers(shape, dtype, self.boundary._device)
        inherited = getattr(self.__dict__.get("_kind"), name, None)
        if name == "device" and isinstance(inherited, property):
            return torch.device(self.boundary._device)
        if isinstance(inherited, property) and inherited.fget is not None:
            return inherited.fget(self)
        if inherited is not None and not callable(inherited):
            return inherited
        raise NotHeldError(f"{self._name} is on another stage, and its {name!r} is asked for", self._name)


class NotHeldError(AttributeError):
    """Code asks a stand-in for more than a call of the module."""

    def __init__(self, message: str, unit: str) -> None:
        super().__init__(message)
        self.unit = unit


def _absent(child: nn.Module, name: str, boundary: Boundary) -> nn.Module:
    """The stand-in of a module below an absent one; containers stay what they are."""
    if isinstance(child, nn.ModuleDict):
        return nn.ModuleDict({n: _absent(c, f"{name}.{n}", boundary) for n, c in child.items()})
    if isinstance(child, nn.ModuleList):
        return nn.ModuleList(_absent(c, f"{name}.{n}", boundary) for n, c in child.named_children())
    return Absent(child, name, boundary)


def _hidden(value: Value) -> str:
    return (
        f"{value} crosses the cut inside a custom autograd function or a reentrant checkpoint, which hide it from the "
        "stage; recompute with use_reentrant=False"
    )


def no_numbers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor of one element's memory: NaN, the smallest integer, or False."""
    if dtype.is_floating_point or dtype.is_complex:
        value: float | int = float("nan")
    else:
        value = 0 if dtype is torch.bool else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(shape)


def select_output(output: Any) -> Any:
    """What a last stage returns of a model's output: its logits, or else its last hidden state; anything else whole.

    A tuple of a transformers model is in the order of its output class, logits first.
    """
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(value, torch.Tensor):
            return value
    return output
