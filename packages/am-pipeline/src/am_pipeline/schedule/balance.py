"""What each part of a model costs, and stages of consecutive layers that cost about the same."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from am_pipeline.cut.anatomy import Anatomy, config_value
from am_pipeline.step.inputs import DECODER_IDS

Balance = Literal["flops", "parameters", "time", "layers"]
BALANCES: tuple[str, ...] = get_args(Balance)


@dataclass(frozen=True)
class Costs:
    """Cost of what runs before the stack, of every layer, and of what runs after it, in any one unit."""

    before: float
    layers: tuple[float, ...]
    after: float


def costs_of(
    model: nn.Module,
    anatomy: Anatomy,
    by: str,
    lengths: Sequence[float] = (),
    flops: Mapping[str, float] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Costs:
    """What the parts of a model cost.

    Args:
        model: the whole model; on meta unless `by` is `"time"`.
        anatomy: where its parts are.
        by: `"flops"` for the forward FLOPs of one token in matrix products (two per weight; of stacked or listed
            experts only the share that a token goes through; attention scores not counted), `"parameters"`, `"time"`
            for seconds of a forward of 256 tokens on the device where the model is, or `"layers"` for one per layer
            and nothing else.
        lengths: tokens of each stack, an encoder's and a decoder's, whose FLOPs are counted; one each unless given.
        flops: by name of a module, FLOPs that have been counted where `lengths` do not tell: of images.
        inputs: what is timed instead of 256 tokens.

    Raises:
        ValueError: an unknown name, or `"time"` for a model on meta.
    """
    if by not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {by!r}")
    if by == "layers":
        return Costs(0.0, (1.0,) * anatomy.num_layers, 0.0)
    if by == "time":
        return _measured(model, anatomy, inputs)
    weigh = _flops if by == "flops" else _parameters
    share = _expert_share(model)

    def cost(names: Iterable[str], length: float) -> float:
        if by == "flops" and flops is not None:
            return float(
                sum(n for unit, n in flops.items() if any(f"{unit}.".startswith(f"{name}.") for name in names))
            )
        return sum(weigh(model.get_submodule(name), share) for name in names) * (length if by == "flops" else 1)

    lengths = lengths or [1] * len(anatomy.depths)
    of_layer = [length for length, depth in zip(lengths, anatomy.depths, strict=True) for _ in range(depth)]
    with_layer = [[layer, *(n for n, at in anatomy.joints if at == i)] for i, layer in enumerate(anatomy.layers)]
    layers = tuple(map(cost, with_layer, of_layer))
    return Costs(cost(anatomy.before, lengths[0]), layers, cost(anatomy.after, lengths[-1]))


def balanced(costs: Costs, num_stages: int) -> list[range]:
    """Consecutive, non-empty layer ranges whose costliest is as cheap as can be; then as even as can be.

    What runs before the stack counts for the first stage, what runs after it for the last.

    Raises:
        ValueError: `num_stages` is not between 1 and the number of layers.
    """
    count = len(costs.layers)
    if not 1 <= num_stages <= count:
        raise ValueError(f"num_stages={num_stages} must be between 1 and the number of layers, {count}")
    sums = [0.0]
    for cost in costs.layers:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, start: int, end: int) -> float:
        extra = (costs.before if stage == 0 else 0.0) + (costs.after if stage == num_stages - 1 else 0.0)
        return sums[end] - sums[start] + extra

    # best[end]: the stages so far end before layer `end`; the value is (costliest, sum of squares) and where they end.
    best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), ())}
    for stage in range(num_stages):
        ends = [count] if stage == num_stages - 1 else range(stage + 1, count - (num_stages - stage - 1) + 1)
        following: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
        for end in ends:
            options = []
            for start, ((worst, squares), path) in best.items():
                if start < end:
                    cost = cost_of(stage, start, end)
                    options.append(((max(worst, cost), squares + cost * cost), (*path, end)))
            following[end] = min(options)
        best = following
    edges = (0, *best[count][1])
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def _parameters(module: nn.Module, _share: tuple[int, float] | None) -> float:
    return float(sum(p.numel() for p in module.parameters()))


def _flops(module: nn.Module, share: tuple[int, float] | None) -> float:
    return 2.0 * sum(numel for numel in _multiplied(module, share))


def _multiplied(module: nn.Module, share: tuple[int, float] | None) -> Iterator[float]:
    """How many of the weights below a module one token is multiplied with."""
    if isinstance(module, nn.Embedding):
        return
    experts, used = share or (0, 1.0)
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 3 and parameter.shape[0] == experts:
            yield parameter.numel() * used
        elif parameter.dim() >= 2:
            yield float(parameter.numel())
    listed = isinstance(module, nn.ModuleList) and len(module) == experts
    for child in module.children():
        for numel in _multiplied(child, share):
            yield numel * used if listed else numel


def _expert_share(model: nn.Module) -> tuple[int, float] | None:
    experts = config_value(model, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    chosen = config_value(model, "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k")
    return (experts, chosen / experts) if experts and chosen else None


def _measured(model: nn.Module, anatomy: Anatomy, inputs: Mapping[str, Any] | None) -> Costs:
    first = next(model.parameters())
    if first.is_meta:
        raise ValueError("balance='time' runs the model, which is on the meta device; use 'flops' or 'parameters'")
    if inputs is None:
        ids = torch.zeros(1, 256, dtype=torch.int64, device=first.device)
        names = tuple(inspect.signature(model.forward).parameters)
        inputs = {name: ids for name in (names[0], DECODER_IDS) if name in names}
    inputs = {n: v.to(first.device) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if first.device.type != "cpu":
            torch.accelerator.synchronize(first.device)
        marks.append(time.perf_counter())

    layers = [model.get_submodule(name) for name in anatomy.layers]
    hooks = [layer.register_forward_pre_hook(mark) for layer in layers] + [layers[-1].register_forward_hook(mark)]
    runs: list[Sequence[float]] = []
    try:
        with torch.no_grad():
            for _ in range(4):
                marks.clear()
                mark()
                model(**inputs)
                mark()
                runs.append([b - a for a, b in itertools.pairwise(marks)])
    finally:
        for hook in hooks:
            hook.remove()
    if len(runs[0]) != len(layers) + 2:
        raise ValueError("balance='time' needs a model that runs every layer once on text; use 'flops'")
    spans = [min(times) for times in zip(*runs[1:], strict=True)]  # the first run warms up
    return Costs(spans[0], tuple(spans[1:-1]), spans[-1])
