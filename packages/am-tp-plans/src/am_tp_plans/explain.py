"""What a plan does to a model, as a table: styles, where they come from, parameters per rank, bytes on the wire."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.config import input_embeddings
from am_tp_plans.expand import matches
from am_tp_plans.fit import check_plan
from am_tp_plans.proof.numeric_check import NumericCheck, check_numbers
from am_tp_plans.proof.rehearsal import Findings, rehearse
from am_tp_plans.proof.watch import Collective
from am_tp_plans.sources.registry import PARALLELIZE_FUNCTIONS
from am_tp_plans.sources.translate import named_styles
from am_tp_plans.stacks import stacks_of, stacks_with
from am_tp_plans.styles.basic import each, shards_sequence
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, PackedColwiseParallel, features
from am_tp_plans.styles.heads import shares_heads
from am_tp_plans.styles.local import LocalShards
from am_tp_styles import KeyValueColwiseParallel


@dataclass(frozen=True)
class Row:
    """One entry of a plan, over all the modules it names.

    Attributes:
        key: module name, `*` for the layers.
        modules: how many there are.
        style: the names of its styles.
        source: who says so: the model's family here, transformers, or what was found missing.
        parameters: of these modules, on one rank.
        forward: bytes that one rank sends for them in a forward.
        backward: in a backward.
    """

    key: str
    modules: int
    style: str
    source: str
    parameters: int
    forward: float
    backward: float


@dataclass(frozen=True)
class PlanReport:
    """A plan for one model and axis. Printing it gives a table.

    Attributes:
        rows: in the order of the model.
        ranks: size of the axis.
        batch: sequences in a step.
        seq_len: tokens in a sequence.
        parameters: of the whole model.
        held: parameters on one rank.
        whole: wildcard names of the parameters that every rank holds whole, with their numbers.
        collectives: how many per step, by phase and kind.
        hidden_bytes: of the hidden state between layers on one rank.
        layer_bytes: what one rank sends for one layer, forward and backward, on average.
        numbers: what a run of a small twin with numbers showed.
        random: modules, by wildcard name, that draw random numbers for a rank's share in evaluation already.
        whole_sequence: stacks of layers that the plan shards, but not along the sequence, where it does so in others.
        whole_stacks: stacks of layers of which every rank holds all, such as a tower that no plan is known for.
    """

    rows: tuple[Row, ...]
    ranks: int
    batch: int
    seq_len: int
    parameters: int
    held: int
    whole: dict[str, int]
    collectives: dict[tuple[str, str], int]
    hidden_bytes: int
    layer_bytes: tuple[float, float]
    numbers: NumericCheck
    random: tuple[str, ...] = ()
    whole_sequence: tuple[str, ...] = ()
    whole_stacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("module", "", "style", "from", "parameters", "sends forward", "backward")]
        for r in self.rows:
            times = f"x{r.modules}" if r.modules > 1 else ""
            sent = (_bytes(r.forward), _bytes(r.backward))
            rows.append((r.key, times, r.style, r.source, f"{r.parameters:,}", *sent))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join([*left, *right]).rstrip())
        forward, backward = self.layer_bytes
        counts = ", ".join(f"{n} {kind} {phase}" for (phase, kind), n in sorted(self.collectives.items(), reverse=True))
        whole = ", ".join(f"{name} ({number:,})" for name, number in self.whole.items()) or "nothing"
        lines += [
            "",
            f"{self.ranks} ranks, {self.batch} x {self.seq_len} tokens; bytes are what one rank sends in a ring",
            f"parameters on each rank: {self.held:,} of {self.parameters:,} ({self.held / self.parameters:.1%})",
            f"whole on each rank: {whole}",
            f"hidden state between layers: {_bytes(self.hidden_bytes)} on each rank",
            f"a layer sends {_bytes(forward)} forward and {_bytes(backward)} backward",
            f"collectives in a step: {counts or 'none'}",
            f"proven by rules; {self.numbers}",
        ]
        if self.random:
            lines.append(f"random numbers are drawn for a rank's share in: {', '.join(self.random)}")
        if self.whole_sequence:
            lines.append(f"the sequence is whole between the layers of: {', '.join(self.whole_sequence)}")
        if self.whole_stacks:
            lines.append(f"every rank holds all layers of: {', '.join(self.whole_stacks)}")
        return "\n".join(lines)


def explain_plan(
    model: nn.Module,
    plan: dict[str, ParallelStyle],
    ranks: int,
    *,
    batch: int = 1,
    seq_len: int = 2048,
    example_inputs: dict[str, Any] | None = None,
) -> PlanReport:
    """Which module gets which style, what each rank holds and sends; without devices and without real weights.

    Args:
        model: real or on meta.
        plan: for it, from `resolve_plan`, `infer_plan`, or your own.
        ranks: size of the tensor-parallel axis.
        batch: sequences in a step, for the bytes.
        seq_len: tokens in a sequence, for the bytes.
        example_inputs: keyword arguments of a forward, for a model that takes more or other than ids `(B, S)`.

    Raises:
        ValueError: the plan does not fit the model or the axis, or a small twin of the model computes other numbers
            with it.
    """
    if ranks < 1 or batch < 1 or seq_len < 1:
        raise ValueError(f"ranks={ranks}, batch={batch} and seq_len={seq_len} must be positive")
    concrete = check_plan(model, plan, ranks)
    found = rehearse(model, concrete, ranks, example_inputs)
    parameters = dict(model.named_parameters())
    held = {name: _held(name, parameter.numel(), concrete, ranks) for name, parameter in parameters.items()}
    size = next(iter(parameters.values())).element_size()
    per_token = batch * seq_len / (2 * found.tokens)

    def sent(modules: set[str] | None, phase: str) -> float:
        total = 0.0
        for c in found.traffic:
            if c.phase == phase and (modules is None or c.module in modules):
                total += _sent_in_a_ring(c, ranks) * (per_token if c.of_tokens else 1) * size
        return total

    rows = []
    for (key, style), modules in _by_entry(concrete).items():
        own = sum(number for name, number in held.items() if name.rpartition(".")[0] in modules)
        forward, backward = sent(set(modules), "forward"), sent(set(modules), "backward")
        rows.append(Row(key, len(modules), style, _source(model, key, plan), own, forward, backward))
    whole: dict[str, int] = {}
    for name, parameter in parameters.items():
        if ranks > 1 and held[name] == parameter.numel():
            key = re.sub(r"\.\d+(?=\.|$)", ".*", name)
            whole[key] = whole.get(key, 0) + parameter.numel()
    counts: dict[tuple[str, str], int] = {}
    for c in found.traffic:
        counts[c.phase, c.kind] = counts.get((c.phase, c.kind), 0) + (not sums_a_gradient(c))
    if any(sums_a_gradient(c) for c in found.traffic):  # of whole parameters, all together
        counts["backward", "all-reduce"] = counts.get(("backward", "all-reduce"), 0) + 1
    return PlanReport(
        tuple(rows),
        ranks,
        batch,
        seq_len,
        sum(p.numel() for p in parameters.values()),
        sum(held.values()),
        whole,
        counts,
        _hidden_bytes(model, plan, ranks) * batch * seq_len * size,
        _per_layer(model, found, sent),
        check_numbers(model, plan, ranks, example_inputs),
        tuple(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in found.random)),
        _whole_sequence(model, concrete),
        _whole_stacks(model, {name for name, parameter in parameters.items() if held[name] < parameter.numel()}),
    )


def sums_a_gradient(collective: Collective) -> bool:
    """Whether it sums the gradient of a whole parameter, which is done for all of them in one go."""
    return collective.kind == "all-reduce" and not collective.of_tokens


def _sent_in_a_ring(collective: Collective, ranks: int) -> float:
    """Elements that one rank sends."""
    if collective.kind == "all-to-all":
        return collective.elements
    return (2 if collective.kind == "all-reduce" else 1) * collective.elements * (ranks - 1) / ranks


def _held(name: str, number: int, concrete: dict[str, ParallelStyle], ranks: int) -> int:
    owner, _, leaf = name.rpartition(".")
    for style in each(concrete.get(owner)):
        if shares_heads(style):
            return number
        if isinstance(style, (ColwiseParallel, PackedColwiseParallel, ExpertsOverTensorAxis)):
            return number // ranks
        if isinstance(style, (RowwiseParallel, Conv1DRowwiseParallel)) and leaf == "weight":
            return number // ranks
        if isinstance(style, LocalShards) and leaf in style.layouts:
            return number // ranks
    return number


def _by_entry(concrete: dict[str, ParallelStyle]) -> dict[tuple[str, str], list[str]]:
    """Modules of one name in all layers that have the same style."""
    entries: dict[tuple[str, str], list[str]] = {}
    for name, style in concrete.items():
        key = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        entries.setdefault((key, " + ".join(_label(part) for part in each(style))), []).append(name)
    return {(k if len(names) > 1 else names[0], style): names for (k, style), names in entries.items()}


def _label(style: ParallelStyle) -> str:
    kind = type(style).__name__.removesuffix("Parallel")
    layouts = [f"whole, {style.heads} heads"] if isinstance(style, KeyValueColwiseParallel) else []
    for which in ("input_layouts", "output_layouts"):
        layout = getattr(style, which, None)
        layout = layout[0] if isinstance(layout, tuple) else layout
        if layout == Shard(1):
            layouts.append(f"{which.split('_')[0]} by tokens")
    return f"{kind} ({', '.join(layouts)})" if layouts else kind


def _source(model: nn.Module, key: str, plan: dict[str, ParallelStyle]) -> str:
    if type(model) in PARALLELIZE_FUNCTIONS:
        function = PARALLELIZE_FUNCTIONS[type(model)]
        if plan.keys() <= function(model, any(map(shards_sequence, plan.values()))).keys():
            return f"family {function.__module__.rpartition('.')[2]}"
    if named_styles(model):
        said = any(matches(theirs, key) or theirs == key for theirs in named_styles(model))
        return "transformers" if said else "rehearsal"
    return "given"


def _hidden_bytes(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> int:
    width: Any = getattr(input_embeddings(model), "embedding_dim", 0)
    return width // ranks if any(map(shards_sequence, plan.values())) else width


def _whole_sequence(model: nn.Module, concrete: dict[str, ParallelStyle]) -> tuple[str, ...]:
    shards = {name for name, style in concrete.items() if shards_sequence(style)}
    whole = [stack for stack in stacks_with(model, concrete) if stack not in stacks_with(model, shards)]
    return tuple(whole) if shards else ()


def _whole_stacks(model: nn.Module, sharded: set[str]) -> tuple[str, ...]:
    """Of the stacks with projections, those without any of the sharded parameters."""
    stacks = {name for name, layers in stacks_of(model).items() if any(map(features, layers.modules()))}
    return tuple(sorted(stacks - set(stacks_with(model, sharded)))) if sharded else ()


def _per_layer(model: nn.Module, found: Findings, sent) -> tuple[float, float]:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stack = max(lists, key=lambda name: sum(c.module.startswith(f"{name}.") for c in found.traffic), default=None)
    if stack is None:
        return 0.0, 0.0
    edges = {f"{stack}.0", f"{stack}.{len(model.get_submodule(stack)) - 1}"}  # the entry and the exit of the stack
    inside = {c.module for c in found.traffic if c.module.startswith(f"{stack}.")} - edges
    layers = len({module.split(".")[stack.count(".") + 1] for module in inside}) or 1
    return sent(inside, "forward") / layers, sent(inside, "backward") / layers


def _bytes(number: float) -> str:
    if number == 0:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
