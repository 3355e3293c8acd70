"""Colwise projections that read the same hidden state share one replicated input, whose gradient is summed once."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.expand import expand_plan
from am_tp_plans.proof.rehearsal import rehearse
from am_tp_plans.styles.basic import Several, SharedInput, each, is_open_colwise
from am_tp_plans.styles.heads import fewest_ranks


def share_inputs(
    model: nn.Module, plan: dict[str, ParallelStyle], example_inputs: dict[str, Any] | None = None
) -> dict[str, ParallelStyle]:
    """The plan with a `SharedInput` wherever a rehearsal shows that nothing but colwise projections reads an input.

    It saves an all-reduce of the hidden state's gradient for each projection beyond the first.
    """
    shared = dict(plan)
    for owner in dict.fromkeys(key.rpartition(".")[0] for key, style in plan.items() if is_open_colwise(style)):
        siblings = [k for k, style in plan.items() if k.rpartition(".")[0] == owner and is_open_colwise(style)]
        if len(siblings) < 2 or not owner:
            continue
        try:
            trial = shared | {owner: with_style(shared.get(owner), SharedInput())}
            rehearse(model, expand_plan(model, trial), fewest_ranks(model), example_inputs)
        except (ValueError, TypeError):
            continue
        shared = trial
    return shared


def with_style(style: ParallelStyle | None, further: ParallelStyle) -> ParallelStyle:
    """Both styles for one module.

    Raises:
        TypeError: one of them shards the module's own parameters.
    """
    return Several(*each(style), *each(further)) if style is not None else further
