"""Find a way of dividing a model's forward over the context axis in which it is exact, by reading it (`reading.py`).

    way                            ids, masks     the stack     what follows it
    tokens                         part           part          part: per-token heads, next-token losses
    whole inputs                   whole          part          part: position tables and the like before the stack
    ... and extras gathered        whole          part          part; router losses and the like see whole sequences
    ... and everything gathered    whole          part          whole: pooling, losses over the sequence, slices

The *stack* is the module that holds all attention and mixers. What runs on whole sequences, each rank runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from am_moe._torch_compat_fakes import fake_mode
from am_moe.context_parallel.lengths import Decision
from am_moe.context_parallel.nested import map_tensors, tensors_in
from am_moe.context_parallel.picked import Picked
from am_moe.context_parallel.plan import head_tail
from am_moe.context_parallel.reading import Reading, UnprovenError, running
from am_moe.context_parallel.rules import Mean, Part, Sum, Wrong
from am_moe.context_parallel.skeleton import skeleton_of
from am_moe.context_parallel.windows import UnknownMaskError
from am_moe.data_parallel.packed import packed_weights


@dataclass(frozen=True)
class Way:
    """How a forward is divided.

    Attributes:
        whole_inputs: every rank has whole ids, masks and positions; the stack is given its tokens of what enters it.
        whole_labels: labels, too.
        gathers: what of the stack's results is made whole: "nothing", "all", or "extras", all but the first.
    """

    whole_inputs: bool = False
    whole_labels: bool = False
    gathers: str = "nothing"


WAYS = (Way(), Way(True), Way(True, gathers="extras"), Way(True, True, "all"))


@dataclass
class Proof:
    """A way in which a call is exact.

    Attributes:
        way: of dividing it.
        cuts: for each tensor that enters the stack, in order, along which dim it is cut, 0 for not at all.
        entering: what these are, by name; with images, nothing else may enter.
        gathers: for each tensor that leaves the stack, in order, where its tokens are if it is made whole.
        means: the places, among what the model returns, of means over this rank's labels.
        counted: the name of the labels that a sum or mean goes over, "" for none.
        decisions: comparisons with how many tokens there are, which have to be answered as they were.
    """

    way: Way
    cuts: list[int] = field(default_factory=list)
    entering: list[tuple] = field(default_factory=list)
    gathers: list[Part | None] = field(default_factory=list)
    means: list[int] = field(default_factory=list)
    counted: str = ""
    decisions: list[Decision] = field(default_factory=list, compare=False)

    def holds_for(self, call: Call) -> bool:
        """Whether the model decides by a call's number of tokens, a rank's and all, as it did when it was read."""
        lengths = (call.tokens, call.tokens * call.ranks)
        return all(decision.same_for(tokens, call.rows) for decision in self.decisions for tokens in lengths)


@dataclass(frozen=True)
class Known:
    """Modules of a model that are not looked into, by full name; `stack` is the one that runs on a rank's tokens."""

    stack: str
    mixers: tuple[str, ...]
    tables: tuple[str, ...]
    experts: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """Arguments of a model's forward on a rank: what they are, not what is in them.

    Attributes:
        given: by name.
        by_tokens: the names of tensors of this rank's tokens, `(B, S, ...)` or `(1, S, ...)`.
        rows, tokens, ranks: B, S, and how many ranks there are.
        padded: whether an attention mask may have zeros.
        with_images: whether the embeddings are those of a call with images: they are then made of whole ids.
        picked: what enters the stack for some tokens of these images only.
        at_length: whether it is read with as many tokens as it has.
    """

    given: dict[str, Any]
    by_tokens: frozenset[str]
    rows: int
    tokens: int
    ranks: int
    padded: bool
    with_images: bool = False
    picked: Picked | None = None
    at_length: bool = False

    def form(self) -> tuple:
        """What a proof depends on."""
        values = [(n, _form(x, n in self.by_tokens, self.rows)) for n, x in sorted(self.given.items())]
        by_length = self.tokens * self.ranks if self._counts() or self.at_length else 0
        picked = self.picked and self.picked.form()
        return tuple(values), self.padded, self.rows == 1, by_length, self.with_images, picked

    def sizes(self) -> tuple[int, int, int]:
        """Rows, tokens and ranks to read with: small ones, where no argument is a number of tokens."""
        if self.at_length:
            return self.rows, self.tokens, max(self.ranks, 2)
        rows = min(self.rows, 2)
        return (rows, self.tokens, max(self.ranks, 2)) if self._counts() else (rows, 12, 2)

    def _counts(self) -> bool:
        return any(isinstance(x, (int, slice)) and not isinstance(x, bool) for x in self.given.values())


def prove(model: nn.Module, known: Known, call: Call, watched: Callable[[Reading | None], None]) -> Proof:
    """The first way in which this call is exact.

    Args:
        model: of which parameters are read for their shapes only.
        known: its modules that need not be looked into.
        call: what its forward is given.
        watched: told of each run before it starts, so that the attention function answers for it, and None at the end.

    Raises:
        ValueError: no way is proven; names the operator, the module and what it does.
    """
    runs = _Runs(model, known, call, watched)
    reason = ""
    for way in WAYS[call.with_images :] if known.stack else WAYS[:1]:
        try:
            return runs.proof(way)
        except UnprovenError as error:
            reason = str(error)
    raise ValueError(f"context parallelism is not right for {type(model).__name__}: it {reason}")


class _Runs:
    """Runs of a skeleton, whose known modules answer instead of computing."""

    def __init__(self, model: nn.Module, known: Known, call: Call, watched: Callable[[Reading | None], None]) -> None:
        self.model, self.fake = model, fake_mode()
        self.known, self.call, self.watched = known, call, watched
        self.rows, self.tokens, self.ranks = call.sizes()
        self.seq_len = self.tokens * self.ranks
        self.proof_ = Proof(Way())
        self.arguments: dict[str, Any] = {}
        self.reading: Reading = None  # type: ignore[assignment]
        self.recorded: dict[bool, Any] = {}

    def _skeleton(self) -> nn.Module:
        """A new one for each run: a forward may keep things on its modules."""
        known, skeleton = self.known, skeleton_of(self.model, self.fake)
        get = skeleton.get_submodule
        for name in known.mixers:
            get(name).register_forward_pre_hook(self._make_whole, with_kwargs=True)
            get(name).register_forward_hook(self._cut_again)
        for name in known.tables:
            self._answer(get(name), self._table)
        for name in known.experts:
            self._answer(get(name), self._experts)
        if known.stack:
            get(known.stack).register_forward_pre_hook(self._enter_stack, with_kwargs=True)
            get(known.stack).register_forward_hook(self._leave_stack)
        return skeleton

    def proof(self, way: Way) -> Proof:
        """That a way is exact, with and without padding.

        Raises:
            UnprovenError: it is not shown to be.
        """
        decisions: list[Decision] = []
        for padded in {False, self.call.padded}:
            if padded not in self.recorded:
                self.recorded[padded] = self._run(Way(), padded, None)[0].record
            reading, output = self._run(way, padded, self.recorded[padded])
            if reading.at != len(self.recorded[padded]):
                raise UnprovenError("computes less for fewer tokens")
            self._judge(reading, output)
            decisions += reading.decisions
        self.proof_.decisions = decisions
        return self.proof_

    def _run(self, way: Way, padded: bool, recorded: Any) -> tuple[Reading, Any]:
        reading = Reading(
            self.fake, self.tokens, self.seq_len, self.rows, recorded, bool(self.known.mixers) or not self.call.padded
        )
        self.reading, self.proof_ = reading, Proof(way)
        self.arguments = {name: self._whole_argument(name, x, padded) for name, x in self.call.given.items()}
        given = {name: self._argument(name, x, way) for name, x in self.arguments.items()}
        self.watched(reading)
        try:
            skeleton = self._skeleton()
            with running(reading, skeleton):
                output = skeleton(**given)
            return reading, output
        except (UnprovenError, UnknownMaskError):
            raise
        except Exception as error:  # of any kind: its code may not expect a part of a sequence
            if recorded is None and isinstance(error, ValueError):  # the model's own, or a mask that is not known
                raise
            if packed := packed_weights(self.model):
                first = next(iter(packed))
                raise UnprovenError(f"holds packed (quantised) weights such as {first}, which are not read") from error
            what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise UnprovenError(f"cannot be read, its forward ends with {what}") from error
        finally:
            self.watched(None)

    def _judge(self, reading: Reading, output: Any) -> None:
        reading.check_backward(tensors_in(output))
        if len(reading.counted) > 1:
            raise UnprovenError(f"sums losses of {' and '.join(sorted(reading.counted))}")
        self.proof_.counted = next(iter(reading.counted), "")
        if not any(True for _ in tensors_in(output)):
            raise UnprovenError(f"returns no tensors, but a {type(output).__name__}")
        for place, tensor in enumerate(tensors_in(output)):
            state = reading.state(tensor)
            if isinstance(state, Wrong):
                raise UnprovenError(state.reason)
            if isinstance(state, Part) and state.of:
                raise UnprovenError("returns some of its tokens")
            if isinstance(state, Sum):
                raise UnprovenError("returns a sum over one rank's tokens")
            if isinstance(state, Mean):
                self.proof_.means.append(place)
                self.proof_.counted = state.labels

    # Arguments.

    def _whole_argument(self, name: str, value: Any, padded: bool) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = tuple(value.shape)
        if shape[:1] == (self.call.rows,):
            shape = (self.rows, *shape[1:])
        if name in self.call.by_tokens:
            shape = (shape[0], self.seq_len, *shape[2:])
        if name == "position_ids" and value.dim() == 3:  # a text's, and an image's times, rows and columns
            return torch.arange(self.seq_len).expand(value.shape[0], self.rows, self.seq_len).contiguous()
        if name == "position_ids":
            return torch.arange(self.seq_len)[None].expand(shape).contiguous()
        if name == "attention_mask":
            mask = torch.ones(shape, dtype=value.dtype)
            if padded:
                mask[0, :2] = mask[-1, -2:] = 0
            return mask
        return torch.zeros(shape, dtype=value.dtype) if name != "input_ids" else torch.ones(shape, dtype=value.dtype)

    def _argument(self, name: str, value: Any, way: Way) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point() and name in self.call.by_tokens and torch.is_grad_enabled():
            value = value.requires_grad_().clone()  # embeddings are trained, and no leaf
        whole = way.whole_labels if name in LABELS else way.whole_inputs
        if self.reading.recorded is None or whole or name not in self.call.by_tokens:
            return self.reading.give(name, value, None)
        parts = [value[:, start:stop] for start, stop in head_tail(self.seq_len, self.ranks)[0]]
        return self.reading.give(name, torch.cat(parts, 1), Part(1))

    # Known modules.

    def _answer(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        forward = type(module).forward.__get__(module)
        names = tuple(inspect.signature(forward).parameters)
        vars(module)["forward"] = lambda *args, **kwargs: answer(forward, dict(zip(names, args, strict=False)) | kwargs)

    def _table(self, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
        state = self.reading.state(given["position_ids"])
        with self.reading.unseen():
            result = forward(**given)

        def label(tensor: torch.Tensor) -> torch.Tensor:
            return self.reading.new(tuple(tensor.shape), tensor.dtype, state, [])

        return map_tensors(result, label)

    def _experts(self, forward: Callable[..., Any], given: dict[str, Any]) -> torch.Tensor:
        return self.reading.experts(list(tensors_in(given)))

    def _make_whole(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        def whole(tensor: torch.Tensor) -> torch.Tensor:
            return self.reading.whole(tensor, self.arguments)

        return (map_tensors(args, whole), map_tensors(kwargs, whole)) if self.reading.recorded is not None else None

    def _cut_again(self, module: nn.Module, args: tuple, output: Any) -> Any:
        def mine(tensor: torch.Tensor) -> torch.Tensor | None:
            return self.reading.part(tensor) if tensor.shape[:2] == (self.rows, self.seq_len) else None

        return map_tensors(output, mine) if self.reading.recorded is not None else None

    def _enter_stack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.reading.recorded is None or not self.proof_.way.whole_inputs:
            return args, kwargs | self._picked()

        by_tokens = ((self.rows, self.seq_len), (1, self.seq_len))

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            with self.reading.unseen():
                dim = next((dim for dim in (1, 2) if tuple(tensor.shape[dim - 1 : dim + 1]) in by_tokens), 0)
            self.proof_.cuts.append(dim if self.reading.state(tensor) is None else 0)
            self.reading.check_backward([tensor])  # this rank has the gradient of its tokens alone
            return self.reading.part(tensor, dim) if self.proof_.cuts[-1] else tensor

        self.proof_.entering = entering(args, kwargs)
        args, kwargs = map_tensors(args, cut), map_tensors(kwargs, cut)
        return args, kwargs | self._picked()

    def _picked(self) -> dict[str, Any]:
        """Arguments for every third token."""
        if (picked := self.call.picked) is None:
            return {}
        mine = self.reading.recorded is not None
        with self.reading.unseen():
            tokens = [t for part in head_tail(self.seq_len, self.ranks)[0] for t in range(*part)]
            marks = [token % 3 == 0 for token in (tokens if mine else range(self.seq_len))]
            mask = torch.tensor([marks] * self.rows)

        def rows(x: torch.Tensor) -> torch.Tensor:
            state = Part(0, of=picked.mask) if mine else None
            return self.reading.new((self.rows * sum(marks), *x.shape[1:]), x.dtype, state, [x])

        given = {name: map_tensors(value, rows) for name, value in picked.given.items() if name != picked.mask}
        return given | {picked.mask: self.reading.give(picked.mask, mask, Part(1) if mine else None)}

    def _leave_stack(self, module: nn.Module, args: tuple, output: Any) -> Any:
        gathers = self.proof_.way.gathers
        if self.reading.recorded is None or gathers == "nothing":
            return None

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            part = self.reading.state(tensor)
            if isinstance(part, Part) and part.of:
                raise UnprovenError("hands some tokens on from its layers")
            stays = gathers == "extras" and not self.proof_.gathers
            self.proof_.gathers.append(part if isinstance(part, Part) and not stays and not part.uniform else None)
            return self.reading.whole(tensor, {}) if self.proof_.gathers[-1] else tensor

        return map_tensors(output, gather)


LABELS = ("labels", "shift_labels")


def entering(args: tuple, kwargs: dict[str, Any]) -> list[tuple]:
    """What a module is given: name, dims and kind of each tensor, in the order of `map_tensors`; axes of positions."""
    given = [*enumerate(args), *kwargs.items()]
    return [
        (name, x.dim(), x.is_floating_point() or (x.shape[0] if x.dim() == 3 else 0))
        for name, value in given
        for x in tensors_in(value)
    ]


def _form(value: Any, by_tokens: bool, rows: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
    shape = tuple(value.shape)
    if by_tokens:
        return str(value.dtype), shape[0] == rows, shape[2:]
    return str(value.dtype), *("rows" if place == 0 and size == rows else size for place, size in enumerate(shape))
