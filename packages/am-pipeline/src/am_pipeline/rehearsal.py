"""Run a model's own forward with every module that has parameters replaced, to learn whether and how it can be cut.

The skeleton has no parameters, so this costs nothing and works for a model on meta. The runs tell which modules run
before and after the stack, how the hidden state is shaped, and what else that depends on the batch reaches a layer or
the head of a later stage: outputs of the prologue, which then travel along, or the ids themselves.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from am_pipeline.anatomy import Anatomy, candidate_stacks, config_value, sort_around
from am_pipeline.boundary import LAYERS, AbsentModule, Boundary, hidden_state_of, tensors_in
from am_pipeline.skeleton import copy_without


@dataclass(frozen=True)
class Shape:
    """A tensor's dims as plain data: `("batch", "sequence", 4096)`."""

    dims: tuple[int | str, ...]

    def at(self, batch: int, seq_len: int) -> tuple[int, ...]:
        sizes = {"batch": batch, "sequence": seq_len}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    @property
    def batch_dim(self) -> int:
        return self.dims.index("batch")

    @property
    def sequence_dim(self) -> int:
        return self.dims.index("sequence")

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.dims))})"


@dataclass(frozen=True)
class Residual:
    """What runs between the layers of a model.

    Attributes:
        hidden: shape of the hidden state.
        returned: how many values a layer returns as a tuple; 0 for a bare tensor.
        ran: the layers that run on text alone, in order.
        traveling: modules before the stack whose outputs later layers or the head take too, with their shapes.
        needs_ids: whether layers or the head depend on the ids in any other way.
        narrow: whether the head also runs on a hidden state of one token.
    """

    hidden: Shape
    returned: int
    ran: tuple[int, ...]
    traveling: tuple[tuple[str, Shape], ...]
    needs_ids: bool
    narrow: bool


def rehearse(model: nn.Module, stack: str | None = None) -> tuple[Anatomy, Residual]:
    """Find the decoder stack of a model and how its hidden state travels.

    Args:
        model: the whole model; it is not changed and none of its parameters is read.
        stack: full name of the stack, if the caller knows it.

    Raises:
        ValueError: the model cannot be cut between its layers, and why; or it could be cut at several stacks.
    """
    if model.training and (rate := _layer_drop(model)):
        raise ValueError(
            f"{type(model).__name__} skips layers at random in training (layerdrop {rate}), on every stage others; "
            "set it to 0 in its config"
        )
    names = [stack] if stack else candidate_stacks(model)
    found: list[tuple[Anatomy, Residual]] = []
    reasons: list[str] = []
    for name in names:
        try:
            found.append(_Rehearsal(model, name).result())
        except _CannotCutError as why:
            reasons.append(f"between the layers of {name}: {why}")
    if not found:
        raise ValueError(f"{type(model).__name__} cannot be cut {reasons[0]}")
    sizes = [sum(p.numel() for p in model.get_submodule(a.stack).parameters()) for a, _ in found]
    if sizes.count(max(sizes)) > 1:
        stacks = [a.stack for (a, _), size in zip(found, sizes, strict=True) if size == max(sizes)]
        raise ValueError(
            f"{type(model).__name__} has several stacks of the same size, {stacks}; "
            "name the modules of each stage yourself with module_names_per_stage"
        )
    return found[sizes.index(max(sizes))]


def _layer_drop(model: nn.Module) -> float:
    config = getattr(model, "config", None)
    rates = (getattr(config, name, 0.0) for name in ("layerdrop", "decoder_layerdrop"))
    return max((rate for rate in rates if isinstance(rate, float)), default=0.0)


class _CannotCutError(Exception):
    pass


@dataclass
class _Run:
    """What one run showed; the lists have an entry for every layer call."""

    order: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    returned: list[torch.Tensor] = field(default_factory=list)
    beside: list[list[torch.Tensor]] = field(default_factory=list)
    ledgers: list[set[int]] = field(default_factory=list)
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    calls_with: dict[str, tuple] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


class _Rehearsal:
    """The runs of one model with one choice of stack."""

    def __init__(self, model: nn.Module, stack: str) -> None:
        self.model = model
        self.stack = stack
        self.boundary = Boundary(True, True)
        self.boundary.calls = []
        self.skeleton = copy_without(model, stack, set(), self.boundary).eval()  # no dropout: runs are compared
        _fill_tensors(self.skeleton)
        self.boundary.install(self.skeleton)
        self.last_hidden: torch.Tensor | None = None
        self.layers: Any = self.skeleton.get_submodule(stack)

    def result(self) -> tuple[Anatomy, Residual]:
        try:
            return self._result()
        except _CannotCutError:
            raise
        except Exception as error:  # the model's own code, on a batch that is not real
            raise _CannotCutError(_failed(error)) from error

    def _result(self) -> tuple[Anatomy, Residual]:
        plain = self._first_run()
        larger = self._run(5, 16)
        # From here on, what follows the stack sees the same hidden state whatever went in.
        self.layers[plain.order[-1]].receives = True
        self.last_hidden = plain.hidden[0]
        plain, other_ids = self._run(3, 8), self._run(3, 8, first_id=3)
        if not _same(plain, self._run(3, 8, fill={LAYERS: 2.0})):
            raise _CannotCutError("a later layer or the head takes the hidden state of an earlier layer too")
        anatomy = self._anatomy(plain)
        traveling = []
        for name in dict.fromkeys(plain.calls[: plain.calls.index(LAYERS)]):
            if _same(plain, self._run(3, 8, fill={name: 2.0})):
                continue
            if plain.calls.count(name) > 1:
                raise _CannotCutError(f"what {name} returns reaches later layers or the head, but it runs twice")
            small, large = (self._true_shape(name, run.calls_with[name]) for run in (plain, larger))
            traveling.append((name, _shape(small, large, f"the output of {name}")))
        hidden = _shape(plain.hidden[0].shape, larger.hidden[0].shape, "the hidden state between layers")
        if (hidden.dims.count("batch"), hidden.dims.count("sequence")) != (1, 1):
            raise _CannotCutError(
                f"the hidden state between layers is {hidden}: it must have one batch and one sequence dim"
            )
        needs_ids = not _same(plain, other_ids)
        residual = Residual(
            hidden,
            self.boundary.returned,
            tuple(plain.order),
            tuple(traveling),
            needs_ids,
            plain.output.shape[:2] == (3, 8) and not needs_ids and self._runs_narrow(plain.order, hidden),
        )
        return anatomy, residual

    def _first_run(self) -> _Run:
        """Find out what form a layer's result has; the reason is that of the likeliest form."""
        reason = ""
        self.boundary.extra = torch.zeros(())
        for returned in (0, 1, 2, 3):
            self.boundary.returned = returned
            try:
                run = self._run(3, 8)
                if not (why_not := self._why_not(run)):
                    return run
            except Exception as error:  # whatever the model's own code raises is the reason it cannot be cut
                why_not = _failed(error)
            reason = reason if reason and not reason.startswith(_FAILED) else why_not
        raise _CannotCutError(reason)

    def _run(self, batch: int, seq_len: int, *, first_id: int = 0, fill: dict[str, float] | None = None) -> _Run:
        seen = _Run(calls=[])
        self.boundary.fill, self.boundary.calls = fill or {}, seen.calls
        self.boundary.received = self.last_hidden
        ids = torch.zeros(batch, seq_len, dtype=torch.int64)
        ids[:, seq_len // 2 :] = first_id
        hooks = [
            layer.register_forward_hook(self._recorder(index, seen), with_kwargs=True)
            for index, layer in enumerate(self.layers)
        ]
        for module in self.skeleton.modules():
            if isinstance(module, AbsentModule):
                hooks.append(module.register_forward_hook(_call_recorder(seen), with_kwargs=True))
        try:
            with torch.no_grad(), torch.device("cpu"):
                seen.output = self.skeleton(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _true_shape(self, name: str, call: tuple[tuple, dict[str, Any], torch.Size]) -> torch.Size:
        """What the module itself would return: a stand-in guesses, and an embedding of positions may have no batch."""
        args, kwargs, guess = call
        module = self.model.get_submodule(name)
        tensors = (*module.parameters(), *module.buffers())
        memo: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
        memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in module.parameters()}
        try:
            with torch.device("meta"):
                output = copy.deepcopy(module, memo)(*_on_meta(args), **_on_meta(kwargs))
        except Exception:  # it may look at values
            return guess
        return output.shape if isinstance(output, torch.Tensor) else guess

    def _recorder(self, index: int, seen: _Run):
        def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            hidden = hidden_state_of(args, kwargs)
            seen.calls.append(LAYERS)
            seen.order.append(index)
            seen.hidden.append(hidden)
            seen.returned.append(output[0] if isinstance(output, tuple) else output)
            seen.ledgers.append(
                {id(v) for v in kwargs.values() if isinstance(v, (MutableMapping, MutableSequence)) and not v}
            )
            seen.beside.append([t for t in tensors_in((args, kwargs)) if t is not hidden])

        return record

    def _why_not(self, run: _Run) -> str:
        if not run.order:
            return "its forward does not run them on text"
        if run.order != sorted(set(run.order)):
            return f"its forward runs the layers in the order {run.order}"
        for index, (returned, taken) in enumerate(zip(run.returned[:-1], run.hidden[1:], strict=True)):
            if returned is not taken:
                return f"its forward changes the hidden state between layer {index} and layer {index + 1}"
        if any(t is self.boundary.extra for beside in run.beside for t in beside):
            return "a layer takes more from the layer before it than the hidden state"
        if run.ledgers[0] and set.intersection(*run.ledgers) and config_value(self.model, "num_kv_shared_layers") != 0:
            return "its layers hand keys and values to later layers in a dict beside the hidden state"
        between = run.calls[run.calls.index(LAYERS) : len(run.calls) - run.calls[::-1].index(LAYERS)]
        if strangers := sorted(set(between) - {LAYERS}):
            return f"its forward runs {strangers} between the layers"
        for tensors in (*run.beside, [run.output], run.hidden):
            if any(t.is_floating_point() and t.isnan().any() for t in tensors):
                return "its forward reads the weights of a module beside the stack directly"
        return ""

    def _anatomy(self, run: _Run) -> Anatomy:
        first, last = run.calls.index(LAYERS), len(run.calls) - 1 - run.calls[::-1].index(LAYERS)
        called: dict[str, tuple[bool, bool]] = {}
        for place, name in enumerate(run.calls):
            early, late = called.get(name, (False, False))
            called[name] = (early or place < first, late or place > last)
        return sort_around(self.model, self.stack, called)

    def _runs_narrow(self, order: list[int], hidden: Shape) -> bool:
        self.boundary.batch_dim, self.boundary.sequence_dim = hidden.batch_dim, hidden.sequence_dim
        self.layers[order[0]].sends = True
        self.layers[order[-1]].receives = False
        try:
            self._run(3, 8)
        except Exception:  # the head wants the whole sequence: it gets it
            return False
        finally:
            self.layers[order[0]].sends = False
        return True


_FAILED = "its forward failed with its layers replaced"


def _failed(error: Exception) -> str:
    return f"{_FAILED}: {type(error).__name__}: {error}"


def _call_recorder(seen: _Run):
    def record(module: AbsentModule, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        seen.calls_with[module._name] = (args, kwargs, output.shape)

    return record


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(_on_meta(item) for item in value)
    if isinstance(value, dict):
        return {name: _on_meta(item) for name, item in value.items()}
    return value


def _fill_tensors(skeleton: nn.Module) -> None:
    """Buffers and the few parameters left (of the stack's ancestors) move to the CPU; those on meta become ones."""
    for module in skeleton.modules():
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, _real(buffer), persistent)
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(_real(parameter), requires_grad=False))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return torch.ones_like(tensor, device="cpu") if tensor.is_meta else tensor.to("cpu", copy=True)


def _same(one: _Run, other: _Run) -> bool:
    """Whether everything a layer takes beside the hidden state, and the output, is the same in two runs."""
    pairs = zip((*one.beside, [one.output]), (*other.beside, [other.output]), strict=True)
    return all(_equal(before, after) for before, after in pairs)


def _equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


def _shape(first: torch.Size, second: torch.Size, what: str) -> Shape:
    """Tell batch and sequence apart from the shapes at (3, 8) and (5, 16) tokens."""
    roles = {(3, 5): "batch", (8, 16): "sequence"}
    dims = [a if a == b else roles.get((a, b)) for a, b in itertools.zip_longest(first, second)]
    if None in dims:
        raise _CannotCutError(
            f"{what} has shape {tuple(first)} for 3 sequences of 8 tokens and {tuple(second)} for 5 of 16: "
            "its dims must be the batch, the sequence or fixed"
        )
    return Shape(tuple(dims))
