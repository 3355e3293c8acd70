"""Read what a model's own code does with the tokens of a rank, without computing it, before anything is sent.

The forward runs twice without memory (`prove.py`): on whole sequences, as in one process, and on one rank's tokens.
Both must call the same operators; from each, the rules (`rules.py`) say what its result is on one rank. A number that
differs between the runs was made of how many tokens there are.

Known without being looked into: attention that the context's function computes, mixers that run on whole sequences,
rotary tables that are shown the length, and stacked experts, whose rows are independent.
"""

from __future__ import annotations

import functools
import math
import random
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from am_moe._torch_compat import (
    by_argument,
    is_getter,
    needs_numbers,
    operator_name,
    python_functions,
    written_arguments,
)
from am_moe._torch_compat_fakes import is_fake, quiet_fakes, run_without_memory, storage_key
from am_moe.context_parallel.lengths import Decision, Length
from am_moe.context_parallel.nested import map_tensors, tensors_in
from am_moe.context_parallel.rules import DRAWS, IDENTITIES, Operation, Part, State, Wrong, states_after


class UnprovenError(Exception):
    """What a rank would compute is not shown to be its part of what one process computes."""


@dataclass
class _Recorded:
    """A call of an operator in the run on whole sequences; `numbers` are those no operator made, by place."""

    function: Any
    static: dict[str, Any]
    shapes: list[tuple[int, ...]]
    numbers: dict[int, torch.Tensor]


def _apart(answer: Callable[..., Any]) -> Callable[..., Any]:
    """What is no code of the model's decides nothing."""

    @functools.wraps(answer)
    def answered(self: Reading, *args: Any) -> Any:
        with self.unseen():
            return answer(self, *args)

    return answered


class Reading(TorchDispatchMode):
    """One run. With `recorded`, that of another run, it is on a rank's tokens and gives states; else it records."""

    def __init__(
        self, fake: Any, tokens: int, seq_len: int, rows: int, recorded: list[_Recorded] | None, mask_may_differ: bool
    ) -> None:
        super().__init__()
        self.fake, self.tokens, self.seq_len, self.rows = fake, tokens, seq_len, rows
        self.recorded, self.at = recorded, 0
        self.record: list[_Recorded] = []
        self.mask_may_differ = mask_may_differ
        self.states: Any = WeakIdKeyDictionary()
        self.inputs: Any = WeakIdKeyDictionary()  # a view or cast of an input -> its name
        self.origins: Any = WeakIdKeyDictionary()  # the inputs that a tensor depends on
        self.sharing: dict[int, list[weakref.ref]] = {}  # tensors of the same memory
        self.held: list[Any] = []  # their memory, so that its identity is no other's
        self.unknown: set[int] = set()  # real memory with numbers that nobody knows
        self.foreign: set[int] = set()  # real memory that Python fills, as that of torch.tensor(...) and numpy's
        self.decisions: list[Decision] = []  # by how many tokens there are
        self.backwards: set[Any] = set()  # nodes of the graph of gradients that were looked at
        self.counted: set[str] = set()
        self.path: list[str] = []
        self.quiet = False

    # What a run is told.

    def give(self, name: str, tensor: torch.Tensor, state: State) -> torch.Tensor:
        """An argument of the model's forward."""
        self.inputs[tensor], self.origins[tensor] = name, frozenset([name])
        self._label(tensor, state)
        return tensor

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """What runs within is known, and not looked into."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def state(self, tensor: torch.Tensor) -> State:
        return self.states.get(tensor)

    def new(
        self, shape: tuple[int, ...], dtype: torch.dtype, state: State, made_of: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        """A tensor without numbers, which has a gradient if one of those that it is made of has."""
        with self.unseen(), self.fake:
            tensor = torch.empty(shape, dtype=dtype)
            if tensor.is_floating_point() and torch.is_grad_enabled() and any(x.requires_grad for x in made_of):
                tensor = tensor.requires_grad_().clone()  # no leaf, into which nobody might write
        self._label(tensor, state)
        return tensor

    @_apart
    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        """What attention over the whole sequence returns for this run's queries, `(B, S, H, E)`."""
        state: State = None
        self.check_backward([q, k, v] if sinks is None else [q, k, v, sinks])
        if self.recorded is not None:
            states = [self.state(x) for x in (q, k, v)]
            wrong = next((s for s in states if isinstance(s, Wrong)), None)
            right = all(s == Part(2) for s in states) and (sinks is None or self.state(sinks) is None)
            state = wrong or (Part(1) if right else Wrong(f"attends to other tokens than its own in {self._where()}"))
        return self.new((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), q.dtype, state, [q, k, v])

    @_apart
    def experts(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """What stacked experts return: a row for each token of the first of the tensors, which the others route."""
        self.check_backward(tensors)
        states = [self.state(t) for t in tensors]
        wrong = next((s for s in states if isinstance(s, Wrong)), None)
        # Rows and tokens may be one dim in some of them and two in others.
        order = {
            (math.prod(t.shape[: s.dim]) * s.outer, s.inner) if isinstance(s, Part) else None
            for t, s in zip(tensors, states, strict=True)
        }
        state = wrong or (states[0] if len(order) == 1 else Wrong(f"routes others' tokens in {self._where()}"))
        return self.new(tuple(tensors[0].shape), tensors[0].dtype, state, tensors)

    @_apart
    def whole(self, tensor: torch.Tensor, known: dict[str, Any]) -> torch.Tensor:
        """A rank's tokens, made whole."""
        part = self.state(tensor)
        if not isinstance(part, Part):
            return tensor
        self.check_backward([tensor])
        if (name := self.inputs.get(tensor)) in known and tensor.shape == (self.rows, self.tokens):
            same = known[name].to(tensor.dtype)
            self._label(same, None)
            return same
        shape = list(tensor.shape)
        shape[part.dim] = shape[part.dim] // self.tokens * self.seq_len
        return self.new(tuple(shape), tensor.dtype, None, [tensor])

    @_apart
    def part(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """A rank's tokens of what is whole, along a dim."""
        if self.state(tensor) is not None:
            return tensor
        shape = (*tensor.shape[:dim], self.tokens, *tensor.shape[dim + 1 :])
        return self.new(shape, tensor.dtype, Part(dim), [tensor])

    def sizes(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Size:
        """A tensor's shape, in which a rank's tokens are a number that knows what it would be for more."""
        part = self.state(tensor)
        if not isinstance(part, Part) or part.of or self.quiet:
            return shape
        return torch.Size([*shape[: part.dim], self._length(shape[part.dim], part.dim == 0), *shape[part.dim + 1 :]])

    def elements(self, tensor: torch.Tensor, count: int) -> int:
        """How many elements a tensor has, such a number where it holds a rank's tokens."""
        part = self.state(tensor)
        return self._length(count, True) if isinstance(part, Part) and not part.of and not self.quiet else count

    def _length(self, value: int, with_rows: bool) -> Length:
        times, by_rows = value // self.tokens, with_rows and value // self.tokens % self.rows == 0
        each = times // self.rows
        at = (lambda tokens, rows: each * rows * tokens) if by_rows else (lambda tokens, rows: times * tokens)
        return Length.of(value, at, self.decisions)

    def check_backward(self, tensors: Iterable[torch.Tensor]) -> None:
        """Refuse autograd functions that a gradient of a rank's tokens would come through; only forwards are read.

        Raises:
            UnprovenError: names the function.
        """
        if self.recorded is None:
            return
        with self.unseen():
            functions = python_functions(tensors, self.backwards)
        for function in functions:
            package = function.__module__.partition(".")[0]
            if package not in ("torch", "transformers") and not package.startswith("am_"):
                name = f"{function.__module__}.{function.__qualname__}"
                raise UnprovenError(f"has an autograd function, {name}, whose backward is not read")

    # Operators.

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        if self.quiet or func.namespace == "prim":
            return self._compute(func, args, kwargs)
        name, given = operator_name(func), by_argument(func, args, kwargs)
        inputs = list(tensors_in((args, kwargs)))
        if name in _LOOKS:
            self._look(name, inputs)
        numbers = self._foreign_numbers(name, inputs)
        try:
            result = self._compute(func, args, kwargs)
        except Exception as error:
            if needs_numbers(error):
                raise UnprovenError(f"looks at computed numbers ({name}) in {self._where()}") from error
            raise
        outputs = list(tensors_in(result))
        static = {key: _static(value) for key, value in given.items()}
        shapes = [tuple(t.shape) for t in outputs]
        if name == "detach":  # also autograd's own, of what it saves
            self._label(outputs[0], self.state(inputs[0]))
        elif self.recorded is None:
            self.record.append(_Recorded(func, static, shapes, numbers))
            for tensor in outputs:
                self._label(tensor, None)
        else:
            self._follow(func, name, given, inputs, outputs, static, shapes)
        if origins := frozenset[str]().union(*(self.origins.get(t, frozenset()) for t in inputs)):
            for tensor in outputs:
                self.origins[tensor] = origins
        same = len(inputs) == len(outputs) == 1 and inputs[0].numel() == outputs[0].numel() and name in IDENTITIES
        if same and inputs[0] in self.inputs:
            self.inputs[outputs[0]] = self.inputs[inputs[0]]
        return result

    def _follow(
        self, func: Any, name: str, given: dict, inputs: list, outputs: list, static: dict, shapes: list
    ) -> None:
        whole = self._in_whole_run()
        self.at += 1
        same = whole is not None and whole.function is func and list(map(len, whole.shapes)) == list(map(len, shapes))
        if whole is None or not same:
            raise UnprovenError(f"computes something else ({name}) for fewer tokens, in {self._where()}")
        varying = [
            [dim for dim, (one, all_) in enumerate(zip(a, b, strict=True)) if one != all_]
            for a, b in zip(shapes, whole.shapes, strict=True)
        ]
        changed = {key for key, value in static.items() if value != whole.static[key]}
        drawn = any(isinstance(s := self.state(t), Wrong) and DRAWS in s.reason for t in inputs)
        if name == "lt" and drawn and isinstance(given["other"], (int, float)) and given["other"] <= 0:
            self._label(outputs[0], None)
            return  # no random number is below zero, on any rank
        op = Operation(
            name, given, self.state, lambda t: self.inputs.get(t, ""), outputs, varying, changed, self.tokens,
            torch.Tag.pointwise in func.tags, torch.Tag.nondeterministic_seeded in func.tags,
        )  # fmt: skip
        if name.startswith("nll_loss") and given["reduction"] == 2:
            self.counted |= {n for n in self.origins.get(given["target"], ()) if "labels" in n}
        states = states_after(op)
        states = [self._placed(state) for state in states]
        written = written_arguments(func, given) if func._schema.is_mutable else []
        for tensor in written:
            returned = [state for output, state in zip(outputs, states, strict=True) if output is tensor]
            self._write(tensor, returned[0] if returned else Wrong(f"writes ({name}) in {self._where()}"))
        for tensor, state in zip(outputs, states, strict=True):
            if not any(tensor is target for target in written):
                self._label(tensor, state)

    def _placed(self, state: State) -> State:
        """A new reason gets its place; one that is handed on has it."""
        if isinstance(state, Wrong) and " in " not in state.reason:
            return Wrong(f"{state.reason} in {self._where()}")
        return state

    def _label(self, tensor: torch.Tensor, state: State) -> None:
        if state is not None:
            self.states[tensor] = state
        elif tensor in self.states:
            del self.states[tensor]
        key = storage_key(tensor)
        if key not in self.sharing:
            self.held.append(tensor.untyped_storage())
        self.sharing.setdefault(key, []).append(weakref.ref(tensor))

    def know(self, tensor: torch.Tensor) -> None:
        """A parameter or buffer, the same in both runs until it is written."""
        self._label(tensor, None)

    def _in_whole_run(self) -> _Recorded | None:
        """The call that the next one is compared with."""
        return self.recorded[self.at] if self.recorded is not None and self.at < len(self.recorded) else None

    def _foreign_numbers(self, name: str, inputs: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """Numbers that no operator made, by their place: Python may have made them of how many tokens there are."""
        found: dict[int, torch.Tensor] = {}
        for place, tensor in enumerate(inputs):
            if is_fake(tensor) or tensor.is_meta or self.state(tensor) is not None:
                continue
            if (key := storage_key(tensor)) not in self.sharing:
                self._label(tensor, None)
                self.foreign.add(key)
            if key in self.foreign and key not in self.unknown and name != "detach":  # which is not recorded
                found[place] = tensor.detach().clone()
        whole = self._in_whole_run()
        for place, number in found.items() if self.recorded is not None else ():
            other = whole.numbers.get(place) if whole is not None else None
            if other is None or not _same_numbers(number, other):
                self._label(inputs[place], Wrong(f"makes a tensor of how many tokens there are in {self._where()}"))
        return found

    def expose(self, tensor: torch.Tensor) -> None:
        """Python may write into a tensor from now on."""
        self.foreign.add(storage_key(tensor))

    def _write(self, tensor: torch.Tensor, state: State) -> None:
        """A write changes what shares the memory."""
        before = self.state(tensor)
        sharing = [other for ref in self.sharing.get(storage_key(tensor), []) if (other := ref()) is not None]
        self._label(tensor, state)
        for other in sharing:
            was = self.state(other)
            if other is tensor or isinstance(was, Wrong):
                continue
            if isinstance(state, Wrong):
                self.states[other] = state
            elif (now := _beside_a_write(tensor, before, state, other, was)) is not None:
                self.states[other] = self._placed(now)

    def _compute(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if operator_name(func) in ("index", "index_put", "index_put_"):
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        inputs = list(tensors_in((args, kwargs)))
        if not any(is_fake(t) or storage_key(t) in self.unknown for t in inputs):
            return func(*args, **kwargs)
        if func.is_view and not is_fake(inputs[0]):
            return func(*args, **kwargs)
        twins: dict[int, torch.Tensor] = {}

        def twin_of(value: torch.Tensor) -> torch.Tensor:
            if is_fake(value) or value.dim() == 0:
                return value
            with self.fake:
                twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            twins[id(twin)] = value
            return twin

        args, kwargs = map_tensors(args, twin_of), map_tensors(kwargs, twin_of)
        result = run_without_memory(self.fake, func, args, kwargs)
        if func._schema.is_mutable:
            self.unknown |= {storage_key(value) for value in twins.values()}
        return map_tensors(result, lambda value: twins.get(id(value), value))

    def _places(self, index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """A mask as the indices of what it marks, where that is known: their number is a shape."""
        if index is None or index.dtype is not torch.bool or is_fake(index) or storage_key(index) in self.unknown:
            return (index,)
        return index.nonzero().unbind(1)

    def _look(self, name: str, inputs: list[torch.Tensor]) -> None:
        """Numbers that the model's code reads decide what it does: they have to be the same on every rank."""
        for tensor in inputs:
            origins = self.origins.get(tensor, frozenset())
            state = self.state(tensor)
            if state is not None and self.mask_may_differ and origins == {"attention_mask"}:
                continue  # none has padding, or mixers are given a mask on every rank if any rank has one
            if state is not None:
                reason = state.reason if isinstance(state, Wrong) else f"reads ({name}) one rank's tokens"
                raise UnprovenError(f"decides by what {reason}" if isinstance(state, Wrong) else reason)
            if is_fake(tensor) or storage_key(tensor) in self.unknown:
                raise UnprovenError(f"looks at computed numbers ({name}) in {self._where()}")
            if origins - {"attention_mask"} and self.recorded is not None:
                raise UnprovenError(f"decides by numbers in {', '.join(sorted(origins))} in {self._where()}")

    def _where(self) -> str:
        return self.path[-1] if self.path and self.path[-1] else "its own forward"


def _beside_a_write(tensor: torch.Tensor, before: State, state: State, other: torch.Tensor, was: State) -> State:
    """The state of a tensor after a write of `state` into one of the same memory.

    All tensors of a memory agree on which token is where, except those that are the same along theirs (`uniform`): such
    a one learns it from what is written, if both have the same elements along the dim.
    """
    if not isinstance(was, Part) or not isinstance(state, Part):
        return was if state == before and (state is None or was == state) else _LOST
    if state == before and not state.uniform and not was.uniform:
        return was
    alike = other.shape[was.dim] == tensor.shape[state.dim] and other.stride(was.dim) == tensor.stride(state.dim)
    if alike and was.uniform and not state.uniform:
        return replace(state, dim=was.dim)
    return was if alike and (state.uniform or replace(state, dim=was.dim) == was) else _LOST


def _same_numbers(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal; what is no number equals itself."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


class _Lookers(TorchFunctionMode):
    """Notices methods that read a tensor into Python without an operator, or change its gradient."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.reading.quiet:
            return func(*args, **(kwargs or {}))
        if name in _HOOKS or (name == "__get__" and is_getter(func, "grad_fn")):
            raise UnprovenError(f"puts hooks on gradients, which are not read, in {self.reading._where()}")
        if name in ("tolist", "numpy", "__array__") and isinstance(args[0], torch.Tensor):
            self.reading._look(name, [args[0]])
            self.reading.expose(args[0])
        result = func(*args, **(kwargs or {}))
        if name == "__get__" and is_getter(func, "shape"):
            return self.reading.sizes(args[0], result)
        if name == "size" and isinstance(args[0], torch.Tensor):
            if isinstance(result, torch.Size):
                return self.reading.sizes(args[0], result)
            dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
            return self.reading.sizes(args[0], torch.Tensor.size(args[0]))[dim]
        if name in ("numel", "nelement") and isinstance(args[0], torch.Tensor):
            return self.reading.elements(args[0], result)
        return result


_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
_LOST = Wrong("writes into a part of a tensor")
_LOOKS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "allclose", "bincount"}
_LOOKS |= {"_unique2", "unique_dim", "unique_consecutive", "_is_all_true", "_is_any_true"}


def _static(value: Any) -> Any:
    """What an argument is beside tensors, to be compared."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    return tuple(map(_static, value)) if isinstance(value, (tuple, list)) else value


@contextmanager
def running(reading: Reading, skeleton: nn.Module) -> Iterator[None]:
    """Run a skeleton under a reading, with gradients enabled or not as they are for the call that is read.

    Generators of random numbers are afterwards as before.
    """
    state = random.getstate()
    for tensor in (*skeleton.parameters(), *skeleton.buffers()):
        reading.know(tensor)
    hooks = []
    for name, module in skeleton.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: reading.path.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: _nothing(reading.path.pop()), always_call=True))
    try:
        with (
            torch.random.fork_rng([]), torch.autocast("cpu", enabled=False), quiet_fakes(),
            _Lookers(reading), reading,
        ):  # fmt: skip
            yield
    finally:
        random.setstate(state)
        for hook in hooks:
            hook.remove()


def _nothing(_: Any) -> None:
    """For hooks, whose result would take the place of what a module returns."""
