"""Follow every value of a model's forward: what it was computed from, without computing it.

A *unit* is a module with parameters that the model's own code calls: a layer, an embedding, a final norm, a head, a
whole image encoder. What runs between the calls of units is the model's code on the way: it has no parameters of its
own and runs on every stage. A trace tells of every call of a unit which values it read, and of what the model returns
what it was made of, as a set of sources::

    Value     a tensor that a call of a unit returned            Input    an argument of the model's forward
    Weight    a parameter or buffer that a unit owns, read       Inner    made inside a unit, and not returned by it
              by other code than the unit's                      Draw     a random number drawn between units

Memory, not tensors, has sources: a view has those of what it looks at, and a write adds to them. Beside its sources,
memory has a fingerprint of the computation that made it; two runs in which a unit's operators saw equal fingerprints
computed the same.

What depends on parameters is never computed: those tensors have shapes only. What does not (ids, masks, positions) is
computed on a batch of a few tokens, so that code that looks at it goes its usual way.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from am_pipeline._torch_compat import (
    arguments_by_name,
    flops_of,
    is_random,
    looks_at_values,
    operator_name,
    written_arguments,
)
from am_pipeline._torch_compat_fakes import is_fake, quiet_fakes, run_without_memory, storage_key
from am_pipeline.cut.rows import Over, count_over, may_mix
from am_pipeline.nested import map_leaves, tensors_in


@dataclass(frozen=True)
class Value:
    """One tensor of what one call of a unit returned, by its place among them."""

    unit: str
    call: int
    leaf: int

    def __str__(self) -> str:
        which = f" (call {self.call + 1})" if self.call else ""
        place = f" (tensor {self.leaf + 1})" if self.leaf else ""
        return f"what {self.unit} returns{which}{place}"


@dataclass(frozen=True)
class Input:
    name: str

    def __str__(self) -> str:
        return f"the input {self.name}"


@dataclass(frozen=True)
class Weight:
    unit: str
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Inner:
    unit: str
    call: int
    module: str

    def __str__(self) -> str:
        return f"a tensor made inside {self.module}"


@dataclass(frozen=True)
class Draw:
    place: str

    def __str__(self) -> str:
        return f"random numbers drawn at {self.place}"


Source = Value | Input | Weight | Inner | Draw


class Leaf:
    """A tensor in what a unit returns."""

    def __init__(self, value: Value, tensor: torch.Tensor) -> None:
        self.value, self.shape, self.dtype = value, tuple(tensor.shape), tensor.dtype
        self.requires_grad = tensor.requires_grad


class Argument:
    """A tensor that a unit hands back as it got it: the n-th among all that is in its arguments, None included.

    A mask of ones may be None in one microbatch and a tensor in the next.
    """

    def __init__(self, position: int) -> None:
        self.position = position


@dataclass
class Call:
    """One call of a unit.

    Attributes:
        reads: the sources of what its operators read, other than its own parameters.
        digest: fingerprint of all that its operators did and saw.
        looks: whether it read numbers that are not known, so that it may go another way.
        returns: what it returned, with a `Leaf` or an `Argument` for every tensor.
        random: whether it drew random numbers.
        keeps: name of a parameter or buffer that it wrote into.
        flops: of its matrix products and attention.
        hidden: whether it ran inside a custom autograd function, which does not show autograd what it calls.
    """

    unit: str
    index: int
    reads: set[Source] = field(default_factory=set)
    digest: int = 0
    looks: bool = False
    returns: Any = None
    random: bool = False
    keeps: str = ""
    flops: int = 0
    hidden: bool = False

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for leaf in leaves_of(self.returns) if isinstance(leaf, Leaf)]


@dataclass(frozen=True)
class Look:
    """A number that code between the units read from a tensor: a branch, an index, a length."""

    sources: frozenset[Source]
    place: str


@dataclass
class Trace:
    """What one run showed.

    Attributes:
        calls: of units, in order.
        output: the sources of what the model returned.
        output_keys: fingerprints of its tensors.
        looks: numbers read between units that depend on anything but constants.
        python_random: whether the forward drew from Python's own generator, which no stage shares with another.
        stale: where what an earlier forward made is read.
        outside: where a parameter is read that is none of the model's: a function closed over it, for example.
        hooked: tensors on whose gradients code between units puts hooks.
        trained: where the model's code asks whether a gradient goes through a tensor that a unit made.
        written: values that were written into after they were returned.
        kept: parameters and buffers that code between units wrote into, and from what.
        opened: units of which code between units called a part by itself.
        over: operators in units that could go over the sequences of a batch.
    """

    calls: list[Call] = field(default_factory=list)
    output: frozenset[Source] = frozenset()
    output_keys: tuple[int, ...] = ()
    looks: list[Look] = field(default_factory=list)
    python_random: bool = False
    stale: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    hooked: list[Look] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    written: set[Value] = field(default_factory=set)
    kept: dict[str, frozenset[Source]] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    over: list[Over] = field(default_factory=list)

    def call(self, unit: str, index: int) -> Call:
        return next(c for c in self.calls if (c.unit, c.index) == (unit, index))


def leaves_of(returned: Any) -> Iterator[Any]:
    found: list[Any] = []
    map_leaves(returned, found.append)
    yield from found


@dataclass
class _Memory:
    """What is known of one storage."""

    storage: Any  # kept, so that its identity is not given to another
    sources: frozenset[Source]
    key: int
    maker: Call | None = None
    writer: Call | None = None  # the last unit that wrote into what it did not make
    exported: bool = False
    unknown: bool = False
    weight: tuple[str, ...] = ()


class Tracer(TorchDispatchMode):
    """Runs a weightless model and follows its values; `units` names the unit that a module is or is part of.

    Args:
        model: its parameters have shapes only.
        fake: the mode that made them.
        unit_of: the unit that a module of this name belongs to; None for the model's own code between units.
    """

    def __init__(self, model: nn.Module, fake: Any, unit_of: Callable[[str], str | None]) -> None:
        super().__init__()
        self.model, self.fake, self.unit_of = model, fake, unit_of
        self.trace = Trace()
        self.memory: dict[int, _Memory] = {}
        self.active: Call | None = None
        self.path: list[str] = []
        self.counts: Counter[str] = Counter()
        self.left: set[int] = set()  # what an earlier forward made
        self.narrow = False  # what absent units return has fewer tokens than it should
        self.draws = 0
        self.quiet = False
        self._values: dict[Value, torch.Tensor] = {}
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        for name, tensor in tensors:
            known = self.memory.get(storage_key(tensor))
            names = (*(known.weight if known else ()), name)
            # Copies of a weightless model share its parameters, under one name or another.
            identity = storage_key(tensor) if is_fake(tensor) else names[0]
            self._remember(tensor, frozenset(), hash(("weight", identity)), weight=names)

    def run(self, forward: Callable[[], Any], twice: bool = False) -> Trace:
        """Call `forward`, which runs the model and returns the tensors that count as its output.

        With `twice` it is called once more, to see whether it reads what the first call left.
        """
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name), with_kwargs=True))
        try:
            with _generators_kept() as drawn, quiet_fakes(), torch.enable_grad(), _on_the_cpu():
                with _Lookers(self), self:
                    output = list(tensors_in(forward()))
                self.trace.python_random = drawn()
                if twice:
                    self._run_again(forward)
        finally:
            for handle in handles:
                handle.remove()
        # A function of its own or a checkpoint around a unit gives its result a gradient when the unit is done.
        for leaf in (leaf for call in self.trace.calls for leaf in call.leaves):
            leaf.requires_grad = self._values[leaf.value].requires_grad
        self.trace.output = frozenset().union(*(self._of(t).sources for t in output))
        self.trace.output_keys = tuple(map(self._fingerprint, output))
        return self.trace

    def _run_again(self, forward: Callable[[], Any]) -> None:
        first, self.trace = self.trace, Trace()
        counts, self.counts = self.counts, Counter()
        self.left = {key for key, memory in self.memory.items() if not memory.weight}
        with _Lookers(self), self:
            forward()
        first.stale = self.trace.stale
        one, two = ([call.unit for call in trace.calls] for trace in (first, self.trace))
        if one != two:
            first.stale.append("a second forward, which runs other modules than the first, perhaps since it")
        self.trace, self.counts = first, counts

    def input(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """An input of the model, known by its name."""
        tensor = tensor.clone()
        self._remember(tensor, frozenset([Input(name)]), hash(("input", name)))
        return tensor

    def given(self, value: Value, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> torch.Tensor:
        """A value of a unit that does not run here."""
        tensor = self.unknown(shape, dtype)
        if requires_grad:
            with self._quietly(), torch.enable_grad():  # code may write into it, which a leaf does not allow
                tensor = tensor.requires_grad_().clone()
        self._remember(tensor, frozenset([value]), _key_of(value))
        return tensor

    def unknown(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without memory or history."""
        with self._quietly(), self.fake:
            return torch.empty(shape, dtype=dtype)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that counts as the tensor itself."""
        memory = self._of(tensor)
        with self._quietly():
            copied = tensor.clone()
        self._remember(copied, memory.sources, memory.key)
        return copied

    def absent(self, unit: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Stands for what a unit that does not run here would have returned; nobody may read it."""
        tensor = self.unknown(shape, dtype)
        self._remember(tensor, frozenset([Inner(unit, -1, unit)]), hash(("absent", unit, len(self.memory))))
        return tensor

    def hook(self, tensor: torch.Tensor) -> None:
        """A hook on the gradient of a tensor: code between units puts it on both sides of a cut."""
        memory = self._of(tensor)
        if self.active is None or memory.maker is not self.active:
            self.trace.hooked.append(Look(memory.sources, _place()))

    def asks_for_gradient(self, tensor: torch.Tensor) -> None:
        """Code asks whether a tensor requires a gradient: what arrives at a stage does, whatever was trained before."""
        if any(isinstance(source, (Value, Inner)) for source in self._of(tensor).sources) and _is_of_the_model():
            self.trace.trained.append(_place())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self.quiet:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # most of all calls
            return torch.device("cpu")
        name = operator_name(func)
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        tensors = list(tensors_in((args, kwargs)))
        by_form = name.split(".")[1] in _BY_FORM
        memories = [] if by_form else [self._of(t) for t in tensors]
        if self.left and not by_form:
            self._notice_left(tensors)
        written = [id(t) for t in written_arguments(func, args, kwargs)]
        fingerprint = _geometry if by_form else self._fingerprint
        seen = hash((name, _static(args), _static(tuple(kwargs.items())), *map(fingerprint, tensors)))
        draws = is_random(func)
        if draws and self.active is None:
            self.draws += 1
            seen = hash((seen, self.draws))
        if self.active is not None:
            self._read_inside(self.active, memories, seen)
            self.active.random |= draws
        sources = self._sources(memories)
        if self.active is None and draws:
            sources |= {Draw(f"{name} of {_place()}")}
        unknown = any(self._of(t).unknown for t in tensors)
        if self.narrow and name in _BY_PLACE and any(isinstance(s, Inner) and s.call < 0 for s in sources):
            raise IndexError(f"{name} picks places of {_place()} that are not there")
        masks = _masks(args[1]) if name == "aten.index.Tensor" else None
        if name in _GUESSES or (looks_at_values(func) and masks != []):
            if self.active is not None:
                self.active.looks |= unknown or draws or self.active.random
            # How many a mask picks is a matter of the mask, whatever it picks from.
            self._look(sources if masks is None else self._sources([self._of(mask) for mask in masks]))
        result = self._compute(func, name, args, kwargs, tensors, unknown)
        if self.active is not None:
            self.active.flops += flops_of(func, args, kwargs, result)
            operator = name.split(".")[1]
            if may_mix(operator) and (count := count_over(operator, arguments_by_name(func, args, kwargs))) is not None:
                self.trace.over.append(Over(operator, self.path[-1], count))
        self._label(seen, sources, result, unknown, [t for t in tensors if id(t) in written])
        return result

    # What operators read and make.

    def _sources(self, memories: list[_Memory]) -> frozenset[Source]:
        sources = frozenset().union(*(memory.sources for memory in memories))
        if self.active is None:
            sources = sources.union(*(self._weights_read(memory, None) for memory in memories))
        return sources

    def _notice_left(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            memory = self._of(tensor)
            if storage_key(tensor) in self.left and any(isinstance(s, (Value, Inner)) for s in memory.sources):
                self.trace.stale.append(
                    f"{self.path[-1] if self.path and self.path[-1] else 'its forward'} at {_place()}"
                )

    def _read_inside(self, call: Call, memories: list[_Memory], seen: int) -> None:
        call.digest = hash((call.digest, seen))
        for memory in memories:
            if memory.maker is not call:
                call.reads |= {s for s in memory.sources if not _is_inside(s, call)}
                call.reads |= self._weights_read(memory, call.unit)

    def _weights_read(self, memory: _Memory, reader: str | None) -> frozenset[Source]:
        """A unit's parameter or buffer is its own business; read by other code it is a source."""
        owners = [(unit, name) for name in memory.weight if (unit := self.unit_of(name.rpartition(".")[0])) is not None]
        if len(owners) < len(memory.weight) or any(unit == reader for unit, _ in owners):
            return frozenset()  # a root's parameter is on every stage
        return frozenset(Weight(*owner) for owner in owners[:1])

    def _label(
        self, seen: int, sources: frozenset[Source], result: Any, unknown: bool, written: list[torch.Tensor]
    ) -> None:
        call = self.active
        inside = frozenset([Inner(call.unit, call.index, self.path[-1])]) if call is not None else sources
        for tensor in written:
            memory = self._of(tensor)
            if memory.weight and call is None:
                self.trace.kept[memory.weight[0]] = memory.sources | sources
            if memory.weight and call is not None:
                call.keeps = memory.weight[0]
            if memory.exported:
                self.trace.written |= {s for s in memory.sources if isinstance(s, Value)}
            if call is None or memory.maker is not call:
                memory.sources |= inside
                memory.writer = call
            memory.key = hash((memory.key, seen, *_geometry(tensor)))
            memory.unknown |= unknown
        for place, tensor in enumerate(tensors_in(result)):
            if storage_key(tensor) not in self.memory:
                self._remember(tensor, inside, hash((seen, place)), maker=call)

    def _compute(
        self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], tensors: list[torch.Tensor], unknown: bool
    ) -> Any:
        if not unknown:
            return func(*args, **kwargs)
        if func.is_view and not is_fake(tensors[0]):
            return func(*args, **kwargs)  # of real memory whose contents are not known any more
        if name in _GUESSES:
            return _GUESSES[name](self, args, kwargs)
        if any(w in name for w in ("aten.index.", "aten.index_put", "aten._index_put_impl_", "aten._unsafe_index")):
            args = (args[0], self._without_bools(args[0], args[1]), *args[2:])
        if "aten.split_with_sizes" in name:
            args = (args[0], _that_add_up(args[0], *args[1:]), *args[2:])
        twins: dict[int, torch.Tensor] = {}

        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or is_fake(value):
                return value
            twin = self.unknown_like(value)
            twins[id(twin)] = value
            return twin

        result = run_without_memory(self.fake, func, map_leaves(args, fake), map_leaves(kwargs, fake))
        return map_leaves(result, lambda value: twins.get(id(value), value))

    def unknown_like(self, tensor: torch.Tensor) -> torch.Tensor:
        with self._quietly(), self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    def _without_bools(self, tensor: torch.Tensor, indices: list[Any]) -> list[Any]:
        """A mask of unknown truth picks everything."""
        plain: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                plain.append(index)
            elif self._of(index).unknown:
                plain += [self.unknown((index.numel(),), torch.int64) for _ in range(index.dim())]
            else:
                plain += index.nonzero(as_tuple=True)
        return plain

    def _look(self, sources: frozenset[Source]) -> None:
        if self.active is None and sources:
            self.trace.looks.append(Look(sources, _place()))

    # Memory.

    def _of(self, tensor: torch.Tensor) -> _Memory:
        memory = self.memory.get(storage_key(tensor))
        if memory is None:  # a constant that the model holds outside of parameters and buffers
            if isinstance(tensor, nn.Parameter):
                self.trace.outside.append(f"{self.path[-1] if self.path else 'its forward'} at {_place()}")
            with self._quietly():
                content = tensor.flatten()[:4096].tolist() if not is_fake(tensor) and not tensor.is_meta else ()
            key = hash(("constant", str(tensor.dtype), tuple(tensor.shape), str(content)))
            memory = self._remember(tensor, frozenset(), key)
        return memory

    def _remember(
        self,
        tensor: torch.Tensor,
        sources: frozenset[Source],
        key: int,
        maker: Call | None = None,
        weight: tuple[str, ...] = (),
    ) -> _Memory:
        memory = _Memory(tensor.untyped_storage(), sources, key, maker, unknown=is_fake(tensor), weight=weight)
        self.memory[storage_key(tensor)] = memory
        return memory

    def _fingerprint(self, tensor: torch.Tensor) -> int:
        return hash((self._of(tensor).key, *_geometry(tensor)))

    # Calls of units.

    def _entering(self, name: str):
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.path.append(name)
            unit = self.unit_of(name)
            if self.active is None and unit is not None and unit != name:
                self.trace.opened.add(unit)
            if self.active is None and name and unit == name:
                call = Call(name, self.counts[name])
                self.counts[name] += 1
                self.trace.calls.append(call)
                self.active = call

        return enter

    def _leaving(self, name: str):
        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            self.path.pop()
            call = self.active
            if call is None or call.unit != name or name in self.path:
                return None
            self.active = None
            return self._returned(call, list(leaves_of((args, kwargs))), output)

        return leave

    def _returned(self, call: Call, arguments: list[Any], output: Any) -> Any:
        """What the unit returned, made a source: every tensor that it made or wrote is a value of this call."""
        values: dict[int, Value] = {}
        template: list[Any] = []
        call.hidden = not torch.is_grad_enabled() and _in_autograd_function()

        def export(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                template.append(leaf if _is_plain(leaf) else None)
                return leaf
            memory = self._of(leaf)
            made = memory.maker is call or memory.writer is call
            position = next((i for i, argument in enumerate(arguments) if argument is leaf), None)
            if not made and position is not None and not call.looks:
                template.append(Argument(position))
                return leaf
            if storage_key(leaf) not in values and (not made or not _is_all_of_its_memory(leaf)):
                leaf = self.unknown(tuple(leaf.shape), leaf.dtype)  # what travels is contiguous
                memory = self._remember(leaf, frozenset(), 0)
            value = values.setdefault(storage_key(leaf), Value(call.unit, call.index, len(values)))
            memory.sources, memory.key = frozenset([value]), _key_of(value)
            memory.maker, memory.writer, memory.exported = None, None, True
            self._values[value] = leaf
            template.append(Leaf(value, leaf))
            return leaf

        output = map_leaves(output, export)
        leaves = iter(template)
        call.returns = map_leaves(output, lambda _: next(leaves))
        return output

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before


@contextmanager
def _generators_kept() -> Iterator[Callable[[], bool]]:
    """Generators of random numbers are afterwards as before; tells whether one that is not torch's was used."""
    numpy = sys.modules.get("numpy")
    before, of_numpy = random.getstate(), numpy.random.get_state() if numpy else None

    def used() -> bool:
        if random.getstate() != before:
            return True
        return numpy is not None and not all(map(numpy.array_equal, numpy.random.get_state(), of_numpy))

    try:
        with torch.random.fork_rng([]):
            yield used
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(of_numpy)


def _on_the_cpu() -> AbstractContextManager:
    """With the CPU as the default device, which it mostly is: each function of torch asks a mode that sets another."""
    cpu = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == cpu else cpu


class _Lookers(TorchFunctionMode):
    """Notices methods that read a tensor into Python without an operator."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "__array__") and isinstance(args[0], torch.Tensor):
            self.tracer._look(self.tracer._of(args[0]).sources)
        if name == "register_hook":
            self.tracer.hook(args[0])
        if name == "__get__" and getattr(func.__self__, "__name__", "") in ("requires_grad", "grad_fn", "is_leaf"):
            self.tracer.asks_for_gradient(args[0])
        return func(*args, **(kwargs or {}))


def _nonzero(tracer: Tracer, args: tuple, kwargs: dict) -> torch.Tensor:
    return tracer.unknown((args[0].numel(), args[0].dim()), torch.int64)


def _scalar(tracer: Tracer, args: tuple, kwargs: dict) -> Any:
    dtype = args[0].dtype
    return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _unique(tracer: Tracer, args: tuple, kwargs: dict) -> tuple[torch.Tensor, ...]:
    flat = (args[0].numel(),)
    return (tracer.unknown(flat, args[0].dtype), *(tracer.unknown(flat, torch.int64) for _ in range(2)))


def _unique_rows(tracer: Tracer, args: tuple, kwargs: dict) -> tuple[torch.Tensor, ...]:
    rows = (args[0].shape[args[1]],)
    return (tracer.unknown(tuple(args[0].shape), args[0].dtype), *(tracer.unknown(rows, torch.int64) for _ in range(2)))


def _masked_select(tracer: Tracer, args: tuple, kwargs: dict) -> torch.Tensor:
    return tracer.unknown((torch.broadcast_shapes(args[0].shape, args[1].shape).numel(),), args[0].dtype)


def _bincount(tracer: Tracer, args: tuple, kwargs: dict) -> torch.Tensor:
    return tracer.unknown((kwargs.get("minlength", args[2] if len(args) > 2 else 0) or 1,), torch.int64)


def _repeats(tracer: Tracer, args: tuple, kwargs: dict) -> torch.Tensor:
    return tracer.unknown((kwargs.get("output_size") or args[0].numel(),), torch.int64)


# Operators whose result, or its shape, depends on numbers that are not known. Their results never leave a unit
# unnoticed: between units each of them is a `Look`.
_GUESSES: dict[str, Callable[[Tracer, tuple, dict], Any]] = {
    "aten._local_scalar_dense.default": _scalar,
    "aten.equal.default": lambda tracer, args, kwargs: False,
    "aten._is_all_true.default": lambda tracer, args, kwargs: torch.tensor(True),
    "aten._is_any_true.default": lambda tracer, args, kwargs: torch.tensor(False),
    "aten.nonzero.default": _nonzero,
    "aten.masked_select.default": _masked_select,
    "aten.allclose.default": lambda tracer, args, kwargs: False,
    "aten._unique2.default": _unique,
    "aten.unique_dim.default": _unique_rows,
    "aten.unique_consecutive.default": _unique,
    "aten.bincount.default": _bincount,
    "aten.repeat_interleave.Tensor": _repeats,
}
# Operators that take of a tensor its shape and dtype alone.
_BY_FORM = {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")}
_BY_FORM |= {f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "empty_strided")}
# Operators that pick elements by numbers, which would not be in bounds of a tensor with fewer tokens.
_BY_PLACE = {"aten.index.Tensor", "aten.gather.default", "aten.index_select.default", "aten.take.default"}


def _that_add_up(tensor: torch.Tensor, sizes: list[int], dim: int = 0) -> list[int]:
    """Sizes of pieces, made to add up where they were numbers that nobody knows."""
    missing = tensor.shape[dim] - sum(sizes)
    return [sizes[0] + missing, *sizes[1:]] if missing > 0 else sizes


def sent_key(value: Value, tensor: torch.Tensor) -> int:
    """The fingerprint of a tensor that is this value, unchanged."""
    return hash((_key_of(value), *_geometry(tensor)))


def _masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Those of an indexing operator's indices that are masks; without any, its result has the shape of the indices."""
    return [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]


def _key_of(value: Value) -> int:
    return hash(("value", value.unit, value.call, value.leaf))


def _geometry(tensor: torch.Tensor) -> tuple:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def _is_all_of_its_memory(tensor: torch.Tensor) -> bool:
    size = tensor.numel() * tensor.element_size()
    return tensor.is_contiguous() and tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == size


def _is_inside(source: Source, call: Call) -> bool:
    return isinstance(source, Inner) and (source.unit, source.call) == (call.unit, call.index)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size, torch.device))


def _static(value: Any) -> Any:
    """What an operator's arguments are beside tensors, to be hashed."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, (tuple, list)):
        return tuple(map(_static, value))
    return (type(value).__name__, value) if _is_plain(value) and not isinstance(value, torch.Size) else str(type(value))


def _in_autograd_function() -> bool:
    """Whether a custom autograd function is running, of which autograd sees the ends alone."""
    return any(module == "torch.autograd.function" and frame.f_code.co_name == "apply" for module, frame in _frames())


def _is_of_the_model() -> bool:
    """Whether the code that calls is neither torch's nor ours."""
    caller = next((module for module, _ in _frames() if not module.startswith("am_pipeline.")), "torch")
    return caller.partition(".")[0] != "torch"


def _place() -> str:
    """The line of the model's code that is running."""
    for module, frame in _frames():
        if not module.startswith(("torch.", "am_pipeline.")) and module != "torch":
            return f"{module}:{frame.f_lineno} ({frame.f_code.co_name})"
    return "the model's forward"


def _frames() -> Iterator[tuple[str, Any]]:
    """What is running, innermost first, with the names of its modules."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame
        frame = frame.f_back
