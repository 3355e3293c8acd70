"""Run a model's operators twice, whole and on one rank's share, and compare them one by one.

The first run is the whole model: after each operator the rules (`shares.py`) say which dim of the output would be a
rank's share. The second is one rank's: the same operators must come in the same order, with the same numbers, and every
dim of every tensor must have the whole's size, but the dim that the rules call a share, which has its n-th part.

One thing may be missing on a rank: the repetition of a head that neighbours share, where the rank has one query head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from am_tp_plans.proof.shares import (
    CONSTANTS,
    FEATURES,
    MOVES,
    RANDOM,
    TOKENS,
    Call,
    Share,
    WrongError,
    alike_after,
    dims_added_up,
    shares_after,
)

# The positions of the factors among the arguments of matrix products.
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2)}
# Whether these run depends on how a tensor lies in memory; what they return is what they took.
_COPIES = ("clone", "alias", "detach", "contiguous")
# Views that leave the order of the elements as it is.
_REPEATS = ("unsqueeze", "expand", "view")
_SAME = {"reshape": "view", "_unsafe_view": "view", "_reshape_alias": "view", "lift_fresh_copy": "lift_fresh"}
_DRAWS = RANDOM | {"rand", "randn", "randint", "randperm", "multinomial", "normal", "poisson"}
# Arguments that are sizes of the output, which is compared itself.
_SIZES = ("size", "stride", "split_size", "split_sizes")


@dataclass(frozen=True)
class Collective:
    """What a style communicates once.

    `elements` are those of the whole tensor, before a scatter or after a gather; of an all-to-all those that the
    busiest rank sends to others.
    """

    module: str
    phase: str  # forward or backward
    kind: str  # all-reduce, all-gather, reduce-scatter or all-to-all
    elements: int
    of_tokens: bool  # whether the elements grow with the tokens


class ReadDirectlyError(Exception):
    """A parameter that a style shards is read by code outside its own module."""

    def __init__(self, parameter: str) -> None:
        super().__init__(f"{parameter} is read outside its own module, so it cannot be sharded")
        self.parameter = parameter


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor.

    Attributes:
        share: the dim of which a rank has a part.
        alike: dims along which all values are the same, so that a part of them may stand for any other.
        active: it depends on the batch.
        trained: a gradient goes through it.
        parameters: the names of those that it is made of, with constants only.
        shared_by: the block whose colwise projections alone may read it.
        gathered: its gradient is summed where it was gathered, by that collective if only for colwise readers.
        output_of: the module whose sum over the ranks it is.
        made: the number of the step that made it, or the name of the module.
    """

    share: Share | None = None
    alike: frozenset[int] = frozenset()
    active: bool = False
    trained: bool = False
    parameters: frozenset[str] = frozenset()
    shared_by: str = ""
    gathered: bool | Collective = False
    output_of: str = ""
    made: int | str = ""


@dataclass(frozen=True)
class Tensor:
    """A tensor of the whole run; `made` by the step of that number."""

    shape: tuple[int, ...]
    share: Share | None
    alike: frozenset[int]
    made: int | str


@dataclass(frozen=True)
class Step:
    """An operator of the whole run."""

    name: str
    module: str
    numbers: list[tuple[str, Any]]
    inputs: list[Tensor]
    outputs: list[Tensor]
    values: list[int]  # of the constants that the model made of Python's numbers
    moves: bool  # whether it leaves values alike that are alike


@dataclass(eq=False)
class Watch(TorchDispatchMode):
    """Which tensors hold a rank's share, and which parameters were computed with them.

    Args:
        parameters: of the twin, by name; held, so that no other tensor gets the identity of one.
        ranks: size of the axis.
        whole: the steps of the whole run, which this one must repeat; None for the whole run itself.
    """

    parameters: dict[str, nn.Parameter]
    ranks: int
    whole: list[Step] | None = None
    steps: list[Step] = field(default_factory=list)
    sharded: set[str] = field(default_factory=set)  # parameters that a style shards: only their own module reads them
    summed: set[str] = field(default_factory=set)  # parameters whose gradients a style sums
    partial: set[str] = field(default_factory=set)  # parameters that met a share
    ran: set[str] = field(default_factory=set)  # modules with a style that ran
    modified: set[str] = field(default_factory=set)  # modules with a style whose output is modified in place
    random: dict[str, None] = field(default_factory=dict)  # modules that draw random numbers for a share
    traffic: list[Collective] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)  # those that run, the innermost last
    draws_own: bool = False  # whether a rank draws from its own random state here (see `random_numbers.py`)

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._facts: Any = WeakIdKeyDictionary()
        self._bases: Any = WeakIdKeyDictionary()  # slices of constants -> the constant
        self._written: dict[int, tuple[torch.UntypedStorage, bool]] = {}  # memory that was written: is it trained?
        self._unrepeated: dict[int | str, int | str] = {}  # steps that a rank has no need of -> what made their input

    def facts(self, tensor: torch.Tensor) -> Facts:
        """What is known of a tensor."""
        if (name := self._names.get(id(tensor))) is not None:
            return Facts(parameters=frozenset([name]))
        facts = self._facts.get(tensor) or Facts()
        if self._written and (written := self._written.get(tensor.untyped_storage().data_ptr())):
            facts = replace(facts, alike=frozenset(), trained=facts.trained or written[1])
        return facts

    def note(self, tensor: torch.Tensor, **facts: Any) -> torch.Tensor:
        """Add to what is known of a tensor."""
        self._facts[tensor] = replace(self.facts(tensor), **facts)
        return tensor

    def share(self, tensor: torch.Tensor) -> Share | None:
        return self.facts(tensor).share

    def has(self, tensor: torch.Tensor, kind: str) -> bool:
        """Whether a tensor is a rank's share of features or of tokens."""
        share = self.share(tensor)
        return share is not None and share.kind == kind

    def features(self, tensor: torch.Tensor, parts: list[int]) -> torch.Tensor:
        """Note that the last dim is a rank's part of these widths."""
        return self.activate(self.note(tensor, share=Share(tensor.dim() - 1, FEATURES, tuple(parts))))

    def tokens(self, tensor: torch.Tensor, length: int, dim: int = 1) -> torch.Tensor:
        """Note that a dim is a rank's part of a sequence of `length` tokens."""
        return self.activate(self.note(tensor, share=Share(dim, TOKENS, (length,))))

    def activate(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.note(tensor, active=True, trained=True, alike=frozenset())

    def sends(self, module: str, phase: str, kind: str, elements: int, of_tokens: bool = True) -> None:
        self.traffic.append(Collective(module, phase, kind, elements, of_tokens))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            raise WrongError(f"it runs {func}{self._where()}, which has no rule")
        if func._schema.is_mutable and args and id(args[0]) in self._names:
            return args[0]  # a model that rescales its own weights; here they share one number
        name = func._schema.name.removeprefix("aten::")
        name = _SAME.get(name, name)
        output = _product(name, args) if name in _PRODUCTS else None
        if output is None:
            output = func(*args, **(kwargs or {}))
        inputs, outputs = list(tensors((args, kwargs or {}))), list(tensors(output))
        known = [self.facts(tensor) for tensor in inputs]
        names = set().union(*(facts.parameters for facts in known))
        if read := sorted(names & self.sharded):
            raise ReadDirectlyError(read[0])
        if read := [facts.shared_by for facts in known if facts.shared_by]:
            raise WrongError(f"{read[0]} computes {name} of the input that its projections share")
        if name in _COPIES:
            self._facts[outputs[0]] = replace(known[0], output_of="")
            return output
        pointwise = torch.Tag.pointwise in func.tags
        call = Call(
            name,
            _by_name(func, args, kwargs or {}),
            inputs,
            outputs,
            self.ranks,
            self.share,
            lambda t: self.facts(t).alike,
        )
        try:
            step = self._step(call, pointwise)
            self._refuse_company(name, inputs, known, outputs)
        except WrongError as why:
            raise WrongError(f"{why}{self._where()}") from why
        if any(facts.share for facts in known):
            self.partial |= names
            if name in RANDOM:
                self.random[self.modules[-1] if self.modules else ""] = None
        if name in _DRAWS and self.whole is not None:
            self._check_draw(name, any(facts.share for facts in known))
        self._note_outputs(func, name, inputs, known, outputs, step, names)
        return output

    def _check_draw(self, name: str, share: bool) -> None:
        if share and not self.draws_own:
            raise WrongError(f"it draws ({name}) for one rank's share{self._where()} what all ranks draw alike")
        if self.draws_own and not share:
            raise WrongError(f"it draws ({name}) for a whole value{self._where()} what every rank draws differently")

    def _where(self) -> str:
        return f", in {self.modules[-1]}" if self.modules and self.modules[-1] else ""

    def _step(self, call: Call, pointwise: bool) -> Step:
        """What the rules say of the whole's operator, or the whole's step that this one repeats."""
        if self.whole is not None:
            step = self._next(call)
            self.steps.append(self._repeated(call, step))
            return self.steps[-1]
        shares: list[Share | None] = [None] * len(call.outputs)
        if any(call.share(tensor) for tensor in call.inputs):
            shares = shares_after(call, pointwise)
        alike = alike_after(call, pointwise) if call.outputs else frozenset()
        step = Step(
            call.name,
            self.modules[-1] if self.modules else "",
            _numbers(call),
            [Tensor(tuple(t.shape), call.share(t), call.alike(t), self.facts(t).made) for t in call.inputs],
            [
                Tensor(tuple(t.shape), share, alike if n == 0 else frozenset(), len(self.steps))
                for n, (t, share) in enumerate(zip(call.outputs, shares, strict=True))
            ],
            self._values(call),
            pointwise or call.name in MOVES or call.name in CONSTANTS or call.name in ("where", "_to_copy", "cat"),
        )
        self.steps.append(step)
        return step

    def _next(self, call: Call) -> Step | None:
        """The whole's next step, past those that repeat a head for query heads where a rank has one of them."""
        while len(self.steps) < len(self.whole or ()):
            step = self.whole[len(self.steps)]  # type: ignore[index]
            if step.name == call.name or step.name not in _REPEATS or not step.inputs:
                return step
            (head, *others), made = step.inputs, len(self.steps)
            if others or not head.share or (head.share.copies == 1 and head.made not in self._unrepeated):
                return step
            self._unrepeated[made] = self._unrepeated.get(head.made, head.made)
            self.steps.append(step)
        return None

    def _repeated(self, call: Call, step: Step | None) -> Step:
        """The whole's step, if this one is the same on a rank's share."""
        if step is None or step.name != call.name:
            runs = f"{step.name} in {step.module or 'its forward'}" if step else "nothing more"
            raise WrongError(f"on one rank's share it runs {call.name} where one process runs {runs}")
        for (argument, number), (_, wanted) in zip(_numbers(call), step.numbers, strict=True):
            scaled = argument == "start" and step.outputs[0].share and _cuts_share(call, step)
            if number != wanted and not (scaled and number * self.ranks == wanted):
                raise WrongError(
                    f"it computes {call.name} of all {_kind(step)} and {wanted}, but of one rank's share and {number}"
                )
        if self._values(call) != step.values:
            raise WrongError(f"it computes {call.name} of other constants on one rank's share than of all features")
        moves = step.moves or any(tensor.share for tensor in step.inputs)
        for which, mine, theirs in (("of", call.inputs, step.inputs), ("to", call.outputs, step.outputs)):
            for tensor, whole in zip(mine, theirs, strict=True):
                fixed = dims_added_up(call, tensor) if which == "of" else frozenset()
                self._compare(
                    call.name, which, tuple(tensor.shape), whole, whole.alike - fixed if moves else frozenset()
                )
                if which == "of":
                    self._compare_copies(call.name, tensor, whole)
        return step

    def _compare(self, name: str, which: str, shape: tuple[int, ...], whole: Tensor, alike: frozenset[int]) -> None:
        """Whether a shape is the whole's, with its part of what is a share, or of the dims of `alike` values."""
        wanted = list(whole.shape)
        if whole.share:
            wanted[whole.share.dim] = whole.share.held(wanted[whole.share.dim], self.ranks)
        for dim in alike if len(shape) == len(wanted) else ():
            times, over = divmod(whole.shape[dim], shape[dim] or 1)
            if not over and times and self.ranks % times == 0:
                wanted[dim] = shape[dim]
        if shape != tuple(wanted):
            what = f"one rank's {whole.share.what}" if whole.share else "the whole"
            raise WrongError(
                f"it computes {name} {which} {shape} on one rank's share, where {what} of {whole.shape} would be "
                f"{tuple(wanted)}"
            )

    def _compare_copies(self, name: str, tensor: torch.Tensor, whole: Tensor) -> None:
        """Whether a head that ranks share is read where the whole reads the same, or its repetition."""
        mine = self.facts(tensor)
        shared = mine.share is not None and mine.share.copies > 1
        if (shared or whole.made in self._unrepeated) and mine.made != self._unrepeated.get(whole.made, whole.made):
            raise WrongError(
                f"it computes {name} of {tuple(tensor.shape)} on one rank's share, but whole of other heads"
            )

    def _values(self, call: Call) -> list[int]:
        """Of constants that are met for the first time: made of Python's numbers, or the model's buffers."""
        new = [t for t in call.inputs if t not in self._facts and id(t) not in self._names]
        for tensor in new:
            self._facts[tensor] = Facts()
        return [_digest(tensor) for tensor in new]

    def _refuse_company(self, name: str, inputs: list, known: list[Facts], outputs: list) -> None:
        """A whole activation that meets a share gets a part of its gradient on each rank."""
        share = next((facts.share for facts in known if facts.share), None)
        if share is None or not any(output.is_floating_point() or output.is_complex() for output in outputs):
            return
        for tensor, facts in zip(inputs, known, strict=True):
            if facts.share is None and facts.trained and tensor.is_floating_point():
                raise WrongError(
                    f"it computes {name} of one rank's {share.what} and a whole activation of shape "
                    f"{tuple(tensor.shape)}, whose gradient would be a part of a sum"
                )

    def _note_outputs(
        self, func: Any, name: str, inputs: list, known: list[Facts], outputs: list, step: Step, names: set[str]
    ) -> None:
        active = any(facts.active or facts.share for facts in known)
        trained = active and (bool(names - self.summed) or any(facts.trained for facts in known))
        if func._schema.is_mutable and inputs:
            self._note_write(name, inputs[0], known, step, trained)
        elif name == "slice" and (known[0].alike or inputs[0] in self._bases):
            self._bases[outputs[0]] = self._bases.get(inputs[0], inputs[0])
        if name in CONSTANTS:
            active = trained = False
            names = set()
        for tensor, whole in zip(outputs, step.outputs, strict=True):
            self._facts[tensor] = Facts(
                share=whole.share,
                alike=whole.alike,
                active=active,
                trained=trained and (tensor.is_floating_point() or tensor.is_complex()),
                parameters=frozenset() if active else frozenset(names),
                gathered=known[0].gathered if known else False,
                made=len(self.steps) - 1,
            )

    def _note_write(self, name: str, target: torch.Tensor, known: list[Facts], step: Step, trained: bool) -> None:
        if known[0].output_of:
            self.modified.add(known[0].output_of)
        share = step.outputs[0].share
        if known[0].share != share:  # into a constant: all of it is then a rank's share of what is written
            base = self._bases.get(target, target)
            dim = share.dim if share and base.dim() == target.dim() else 0
            if not share or base.stride() != target.stride() or base.shape[dim] != target.shape[dim]:
                raise WrongError(f"it writes ({name}) one rank's share into a whole tensor{self._where()}")
            self._facts[base] = Facts(share=share, active=True, trained=trained)
        storage = target.untyped_storage()
        before = self._written.get(storage.data_ptr(), (storage, False))
        self._written[storage.data_ptr()] = (storage, before[1] or trained)


def _kind(step: Step) -> str:
    return next((t.share.kind for t in (*step.inputs, *step.outputs) if t.share), FEATURES)


def _cuts_share(call: Call, step: Step) -> bool:
    share = step.inputs[0].share
    return share is not None and call.arguments.get("dim", 0) % len(step.inputs[0].shape) == share.dim


def _by_name(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operator by its own names for them."""
    bound = {}
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _numbers(call: Call) -> list[tuple[str, Any]]:
    """The numbers among the arguments, but those that are sizes or ends of what is returned."""
    found: list[tuple[str, Any]] = []
    for name, value in call.arguments.items():
        if name in _SIZES or (name == "end" and call.name == "slice"):
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        found += [(name, v if v == v else "nan") for v in values if isinstance(v, (int, float, complex))]
    return found


def _digest(tensor: torch.Tensor) -> int:
    """A number that stands for the values of a constant."""
    if tensor.numel() and (0 in tensor.stride() or tensor.numel() > 2**22):
        return hash((tuple(tensor.shape), tensor.flatten()[0].item()))
    return hash(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else 0


def _product(name: str, args: tuple) -> torch.Tensor | None:
    """Something of the shape of a product with weights that share one number: what is in it does not matter."""
    left, right = (args[position] for position in _PRODUCTS[name])
    fits = left.shape[:-2] == right.shape[:-2] and left.shape[-1] == right.shape[-2]
    fits = fits and all(bias.shape[-1] == right.shape[-1] for bias in args[: _PRODUCTS[name][0]])
    if not fits or all(any(factor.stride()) for factor in (left, right)):
        return None  # computed, or refused, by the operator itself
    return left.new_ones(*left.shape[:-1], right.shape[-1])


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
