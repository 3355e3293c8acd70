"""The second witness of a plan: a small twin of the model runs under it with real numbers, on simulated ranks.

The rules (`rehearsal.py`) say that a plan is right; here it is computed. A twin (`twin.py`) runs once as it is and once
on ranks that are threads (`am_tp_styles/simulated.py`), forward and backward, under several conditions. Everything that
it returns and every parameter's gradient must agree on every rank.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import BrokenBarrierError, Lock
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.config import input_embeddings
from am_tp_plans.fit import check_plan
from am_tp_plans.proof.twin import NoTwinError, Twin, make_twin
from am_tp_plans.styles.basic import describe, local_form, shards_sequence
from am_tp_styles.axis import part_of
from am_tp_styles.edges import NeedsRealRanksError
from am_tp_styles.simulated import (
    ExchangeError,
    SimulatedAxis,
    on_simulated_ranks,
    runs_on_simulated_ranks,
    shard_on_simulated_rank,
)
from am_tp_styles.summed_together import sum_gradients_together

# transformers computes softmax, norms and some routers in float32 even in a float64 model.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_known: dict[Any, NumericCheck | str] = {}
_one_at_a_time = Lock()  # random state and the default dtype are the process's


@dataclass(frozen=True)
class NumericCheck:
    """What a run with numbers showed.

    Attributes:
        ranks: how many were simulated.
        error: the largest relative difference of an output or gradient; None if nothing was run.
        conditions: under which it ran.
        left_out: modules that ran whole, because their styles need real ranks.
        why_not: if nothing was run.
    """

    ranks: int
    error: float | None = None
    conditions: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    why_not: str = ""

    def __str__(self) -> str:
        if self.error is None:
            return f"not run with numbers: {self.why_not}"
        under = "; ".join([*self.conditions, *(f"{name} whole" for name in self.left_out)])
        return f"run with numbers on {self.ranks} simulated ranks: largest error {self.error:.0e} ({under})"


def check_numbers(
    model: nn.Module, plan: dict[str, ParallelStyle], ranks: int, example_inputs: dict[str, Any] | None = None
) -> NumericCheck:
    """Run a small twin of the model with numbers, in one process and on simulated ranks, and compare.

    Compared are the outputs (with padding, labels and hidden states where the model takes and returns them) and all
    gradients, under the model's own attention implementation and under sdpa. What was found for a class, config and
    plan is kept. Issues no collective, and leaves random state, modes, default dtype and the model as they are.

    Args:
        model: real or on meta.
        plan: for it, with `*` or without.
        ranks: of the axis; of more than eight a divisor is simulated.
        example_inputs: keyword arguments of its forward; None for ids `(B, S)`.

    Raises:
        ValueError: an output or gradient is another than in one process; names it.
    """
    ranks = next((few for few in range(8, 1, -1) if ranks % few == 0), ranks)
    try:
        concrete = check_plan(model, plan, ranks)
    except (ValueError, TypeError) as why:
        return NumericCheck(ranks, why_not=str(why))
    key = _key(model, concrete, ranks) if example_inputs is None else None
    with _one_at_a_time:
        found = _known.get(key) or _checked(model, concrete, ranks, example_inputs)
        if key is not None:
            _known[key] = found
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _key(model: nn.Module, concrete: dict[str, ParallelStyle], ranks: int) -> Any:
    """What the result depends on; None for a model without a config, which is not known again."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return None
    modules = tuple((name, type(module), "forward" in vars(module)) for name, module in model.named_modules())
    styles = tuple((name, describe(style)) for name, style in concrete.items())
    return config.to_json_string(), _attention(model), modules, styles, ranks


def _checked(
    model: nn.Module, concrete: dict[str, ParallelStyle], ranks: int, example_inputs: dict[str, Any] | None
) -> NumericCheck | str:
    """What the run showed, or the words of an error."""
    default = torch.get_default_dtype()
    if default is not torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        # in a thread of its own, where no mode or context of the caller reaches
        twin, left_out, runs, dtype = on_simulated_ranks(
            1, lambda _: _in_one_process(model, concrete, ranks, example_inputs)
        )[0]
        largest = 0.0
        for run in runs:
            _set_attention(twin.model, run.attention)
            for share in on_simulated_ranks(ranks, partial(_share, twin, run)):
                name, error = _worst(run, share)
                if not error <= _TOLERANCE[dtype]:
                    return _refusal(model, run, name, error, ranks)
                largest = max(largest, error)
        return NumericCheck(ranks, largest, tuple(run.condition for run in runs), left_out)
    except (NoTwinError, NeedsRealRanksError) as why:
        return NumericCheck(ranks, why_not=str(why))
    except ExchangeError as why:
        return f"the plan does not fit {type(model).__name__}: on {ranks} simulated ranks {why}"
    except _FailedOnRanksError as why:
        cause = why.__cause__
        return (
            f"the plan does not fit {type(model).__name__}: run with numbers ({why}), it works in one process, and on "
            f"one of {ranks} simulated ranks it fails with {type(cause).__name__}: {cause}"
        )
    finally:
        torch.set_default_dtype(default)


def _refusal(model: nn.Module, run: _Run, name: str, error: float, ranks: int) -> str:
    of = name.removeprefix("the gradient of ").rpartition(".")[0] if name.startswith("the gradient") else ""
    around = f"the styles of {of} and of the modules around it" if of else "the styles of the modules before it"
    return (
        f"the plan does not fit {type(model).__name__}: run with numbers on {ranks} simulated ranks ({run.condition}), "
        f"{name} is off by {error:.1e} of its largest value; leave {around} out, or pass a plan of your own"
    )


class _FailedOnRanksError(Exception):
    """A rank's own forward or backward failed."""


@dataclass
class _Run:
    """One forward and backward in one process."""

    inputs_in_words: str
    attention: str | None
    args: tuple
    kwargs: dict[str, Any]
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)

    @property
    def condition(self) -> str:
        return self.inputs_in_words + (f" under {self.attention}" if self.attention else "")


def _in_one_process(
    model: nn.Module, concrete: dict[str, ParallelStyle], ranks: int, example_inputs: dict[str, Any] | None
) -> tuple[Twin, tuple[str, ...], list[_Run], torch.dtype]:
    """The twin, what runs whole in it, and what it computes as it is; in float32 where its own code wants that."""
    twin = make_twin(model, concrete, ranks)
    left_out = _left_out(twin)
    twin = Twin(twin.model, {name: style for name, style in twin.plan.items() if name not in left_out})
    try:
        check_plan(twin.model, twin.plan, ranks)
    except (ValueError, TypeError) as why:
        raise NoTwinError(f"the plan does not fit a small {type(model).__name__}: {why}") from why
    error: Exception | None = None
    for dtype in _TOLERANCE:
        twin.model.to(dtype)
        try:
            return twin, left_out, list(_runs(twin, ranks, example_inputs)), dtype
        except Exception as why:  # whatever the model's own code says to ids alone
            error = error or why
    raise NoTwinError(f"a small {type(model).__name__} fails in one process with {type(error).__name__}: {error}")


def _left_out(twin: Twin) -> tuple[str, ...]:
    """Modules whose styles need real ranks here, and those tied to them, if they take and return whole tensors."""
    names = [n for n, s in twin.plan.items() if not runs_on_simulated_ranks(local_form(s), twin.model.get_submodule(n))]
    weights = {id(p) for name in names for p in twin.model.get_submodule(name).parameters()}
    tied = [name for name in twin.plan if weights & {id(p) for p in twin.model.get_submodule(name).parameters(False)}]
    for name in (*names, *tied):
        style = twin.plan[name]
        layouts = [getattr(style, which, (None,))[0] for which in ("input_layouts", "output_layouts")]
        if layouts != [Replicate(), Replicate()]:
            kind = type(twin.model.get_submodule(name)).__name__
            raise NoTwinError(f"{type(style).__name__} computes on DTensors in {name}, a {kind}")
    return tuple(dict.fromkeys([*names, *tied]))


def _runs(twin: Twin, ranks: int, example_inputs: dict[str, Any] | None) -> Iterator[_Run]:
    """Ids alone, or the example; then as much of hidden states, padding and labels as the model takes; that under sdpa.

    Of three sequences of ids one is full, one padded behind its first token, one on its right.
    """
    model, random = twin.model, torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    fixed: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
    own = _attention(model)
    if example_inputs is None:
        ids, padding, padded = _ids(model, ranks, random)
        padding = {name: mask for name, mask in padding.items() if name in takes}
        first = _Run("ids alone", own, (ids,), fixed)
        args: tuple = (padded if padding else ids,)
    else:
        given, padding, args = _for_twin(model, example_inputs), {}, ()
        first = _Run("the example inputs", own, args, fixed | given)
    _run(copy.deepcopy(model), first)  # a copy, because some models change in their first forward
    yield first
    run = first
    sharded = any(map(shards_sequence, twin.plan.values()))
    hidden = {} if sharded or not hasattr(model, "config") else {"output_hidden_states": True}
    labels = {} if "labels" in first.kwargs else _labels(takes, first.outputs, random)
    for parts in (("hidden states", "labels"), ("hidden states",), ("labels",), ()):
        inputs = padding | (hidden if "hidden states" in parts else {}) | (labels if "labels" in parts else {})
        said = [part for part in parts if {"hidden states": hidden, "labels": labels}[part]]
        more = _Run(", ".join(["padding"] * bool(padding) + said), own, args, first.kwargs | inputs)
        if inputs and _takes(model, more):
            yield (run := more)
            break
    if own not in (None, "sdpa") and _set_attention(model, "sdpa"):
        again = _Run(run.inputs_in_words, "sdpa", run.args, run.kwargs)
        if _takes(model, again):
            yield again
        _set_attention(model, own)


def _ids(model: nn.Module, ranks: int, random: torch.Generator) -> tuple[torch.Tensor, dict, torch.Tensor]:
    """Ids of three sequences, a mask that pads two of them, and the ids with padding where it says."""
    tokens, vocabulary = -(-10 // ranks) * ranks, _vocabulary(model)
    ids = torch.randint(min(3, vocabulary - 1), max(vocabulary - 1, 1), (3, tokens), generator=random)
    mask = torch.ones_like(ids)
    # A token before the gap: one that sees nothing at all is NaN in eager float64, and so is every gradient behind it.
    mask[1, 1 : 1 + tokens // 3], mask[2, -(tokens // 3) :] = 0, 0
    number = getattr(getattr(model, "config", None), "pad_token_id", None)
    known = isinstance(number, int) and 0 <= number < vocabulary
    return ids, {"attention_mask": mask}, ids.masked_fill(mask == 0, number) if known else ids


def _for_twin(model: nn.Module, example_inputs: dict[str, Any]) -> dict[str, Any]:
    """The example on the CPU, in the twin's dtype and with ids that it has."""
    dtype, vocabulary = next(p.dtype for p in model.parameters() if p.is_floating_point()), _vocabulary(model)
    given = {}
    for name, value in example_inputs.items():
        if isinstance(value, torch.Tensor):
            value = torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value.detach().to("cpu", copy=True)
            value = value.to(dtype) if value.is_floating_point() else value
            value = value % vocabulary if name.endswith("input_ids") else value
        given[name] = value
    return given


def _takes(model: nn.Module, run: _Run) -> bool:
    """Whether the model runs on these inputs; then the run has its results."""
    try:
        _run(copy.deepcopy(model), run)
    except Exception:  # whatever its own code says to what it does not take
        return False
    return True


def _vocabulary(model: nn.Module) -> int:
    """How many ids there are."""
    embeddings = [input_embeddings(model), *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    return next((e.num_embeddings for e in embeddings if isinstance(e, nn.Embedding)), 2)


def _labels(takes: Mapping[str, Any], outputs: dict[str, torch.Tensor], random: torch.Generator) -> dict[str, Any]:
    """Labels of the form that a head's logits ask for: of tokens, of sequences, or of the ends of answers."""
    logits, start = outputs.get("logits"), outputs.get("start_logits")
    if start is not None and start.dim() == 2 and {"start_positions", "end_positions"} <= set(takes):
        ends = torch.randint(0, start.shape[1], (2, start.shape[0]), generator=random)
        return {"start_positions": ends[0], "end_positions": ends[1]}
    if logits is None or "labels" not in takes or logits.dim() not in (2, 3) or logits.shape[-1] < 2:
        return {}
    return {"labels": torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=random)}


def _attention(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _set_attention(model: Any, implementation: str | None) -> bool:
    """Whether the model now has another attention implementation, or the one it had."""
    if _attention(model) == implementation:
        return True
    try:
        model.set_attn_implementation(implementation)
    except Exception:  # a class that does not have it
        return False
    return _attention(model) == implementation


def _run(model: nn.Module, run: _Run) -> None:
    """Forward and backward of a number made of all outputs; fills the run's results."""
    torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
    output = model(*run.args, **run.kwargs)
    outputs, random = dict(_named(output)), torch.Generator().manual_seed(2)
    terms = []
    for tensor in outputs.values():
        if tensor.requires_grad:
            factors = torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor.dtype)
            finite = torch.where(tensor.isfinite(), tensor, 0)
            terms.append((finite * factors).sum() / max(tensor.numel(), 1) ** 0.5)
    if not terms:
        raise RuntimeError("nothing that it returns has a gradient")
    sum(terms).backward()
    run.outputs = {name: tensor.detach() for name, tensor in outputs.items()}
    run.gradients = {
        f"{owner}.{leaf}" if owner else leaf: parameter.grad
        for owner, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    }


def _named(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an output, through tuples, lists and dicts, with names to tell them by."""
    if isinstance(value, torch.Tensor):
        yield name or "the output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _named(item, f"{name or 'output'}[{index}]")


@dataclass
class _Share:
    """What one rank computed, and how its parameters lie."""

    axis: SimulatedAxis
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    layouts: dict[str, Placement]


def _share(twin: Twin, run: _Run, axis: SimulatedAxis) -> _Share:
    model, parts, layouts = copy.deepcopy(twin.model), {}, {}
    mine = _Run(run.inputs_in_words, run.attention, run.args, run.kwargs)
    try:
        for name, style in twin.plan.items():
            layout = shard_on_simulated_rank(model.get_submodule(name), copy.copy(local_form(style)), axis, parts)
            layouts |= {f"{name}.{leaf}" if name else leaf: placement for leaf, placement in layout.items()}
        sum_gradients_together(model, axis)
        _run(model, mine)
    except (NeedsRealRanksError, ExchangeError, BrokenBarrierError):
        raise
    except Exception as error:  # whatever the model's own code raises on a rank's share
        raise _FailedOnRanksError(run.condition) from error
    return _Share(axis, mine.outputs, mine.gradients, layouts)


def _worst(run: _Run, share: _Share) -> tuple[str, float]:
    """The output or gradient of one rank with the largest error, and that error relative to its largest value."""
    errors = {name: _error(share.outputs.get(name), expected, 0.0) for name, expected in run.outputs.items()}
    whole = [gradient for gradient in run.gradients.values() if gradient is not None]
    floor = 1e-2 * max((g.nan_to_num().abs().max().item() for g in whole if g.numel()), default=0.0)
    for name, expected in run.gradients.items():
        mine, placement = share.gradients[name], share.layouts.get(name)
        if expected is None:
            expected = None if mine is None else torch.zeros_like(mine)
        elif isinstance(placement, Shard):
            dim = placement.dim % expected.dim()
            expected = expected.narrow(dim, *part_of(expected.shape[dim], share.axis))
        if expected is not None:
            errors[f"the gradient of {name}"] = _error(mine, expected, floor)
    name = max(errors, key=lambda name: errors[name])
    return name, errors[name]


def _error(mine: torch.Tensor | None, expected: torch.Tensor, floor: float) -> float:
    """The largest difference relative to the largest value, or to `floor`; a NaN equals a NaN."""
    if mine is None:
        mine = torch.zeros_like(expected)
    if mine.shape != expected.shape or not mine.isnan().equal(expected.isnan()):
        return float("inf")
    if not expected.numel():
        return 0.0
    mine, expected = mine.nan_to_num().double(), expected.nan_to_num().double()
    scale = max(expected.abs().max().item(), floor, 1e-30)
    return (mine - expected).abs().max().item() / scale
