"""Attention on more ranks than it has key/value heads: neighbouring ranks share one.

Eight query heads and two key/value heads on four ranks. Every rank projects its own query heads, and the one key/value
head that these read::

    rank               0      1      2      3
    query heads       0 1    2 3    4 5    6 7
    key/value head     0      0      1      1

The key and value projections stay whole on every rank, and their gradients are summed (`KeyValueColwiseParallel`). The
attention is told that two of its query heads, not four, read one key/value head.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from am_tp_plans.adapters import known_as, without_peft
from am_tp_plans.config import config_value
from am_tp_plans.styles.basic import Several, each, is_open_colwise
from am_tp_plans.styles.fused import HeadsPerRank
from am_tp_styles import ColwiseParallelLora, KeyValueColwiseParallel

_KEY_OR_VALUE = re.compile(r"(k|key|v|value)(_proj)?")
# How an attention may keep the number of query heads that read one key/value head, and that of key/value heads.
_GROUPS = "num_key_value_groups"
_HEADS = ("num_key_value_heads", "num_kv_heads")


class HeadsError(ValueError):
    """An axis that does not fit the number of heads."""


def share_key_value_heads(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> dict[str, ParallelStyle]:
    """The plan, with what attentions need whose key/value heads are fewer than the ranks; others as they are.

    Args:
        model: whole, or a part of a pipeline.
        plan: concrete, without `*`: from `expand_plan`.
        ranks: size of the axis.

    Raises:
        HeadsError: the query heads do not divide over the ranks, or the ranks over the key/value heads.
        ValueError: keys and values have no projections of their own, or ones with another style than `ColwiseParallel`.
    """
    shared = dict(plan)
    for owner, leaves in _open_projections(plan).items():
        attention: Any = model.get_submodule(owner)
        own = [leaf for leaf in leaves if _KEY_OR_VALUE.fullmatch(leaf)]
        heads = _key_value_heads(model, attention, own)
        projections = [name for leaf in own for name in leaves[leaf]]
        if heads is None or heads % ranks == 0 or (own and all(shares_heads(plan[name]) for name in projections)):
            continue
        copies, groups = ranks // heads, getattr(attention, _GROUPS)
        if ranks % heads or groups % copies:
            raise HeadsError(
                f"{owner} has {heads * groups} query heads and num_key_value_heads={heads}, which do not fit "
                f"{ranks} tensor-parallel ranks"
            )
        if not own:
            raise ValueError(
                f"{owner} has {heads} key/value heads for {ranks} ranks, which can share them only where keys and "
                f"values are projected by linears of their own; it has {sorted(leaves)}"
            )
        for name in projections:
            shared[name] = _sharing(name, plan[name], heads)
        shared[owner] = _with_numbers(plan.get(owner), heads, copies)
    return {name: shared[name] for name, _ in model.named_modules() if name in shared}


def fewest_ranks(model: nn.Module, least: int = 2) -> int:
    """The smallest axis of at least so many ranks that the heads in the model's config fit; `least` if none does."""
    heads = config_value(model, "num_attention_heads")
    of_keys = config_value(model, "num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(of_keys, int):
        return least
    fitting = (n for n in range(least, heads + 1) if heads % n == 0 and (of_keys % n == 0 or n % of_keys == 0))
    return next(fitting, least)


def shares_heads(style: ParallelStyle | None) -> bool:
    return isinstance(style, KeyValueColwiseParallel)


def _open_projections(plan: dict[str, ParallelStyle]) -> dict[str, dict[str, list[str]]]:
    """The linears that leave each rank with its own features: by the module that owns them, by their last names."""
    owners: dict[str, dict[str, list[str]]] = {}
    for name, style in plan.items():
        owner, _, leaf = known_as(name).rpartition(".")
        if is_open_colwise(style):
            owners.setdefault(owner, {}).setdefault(leaf, []).append(name)
    return owners


def _key_value_heads(model: nn.Module, attention: Any, own: list[str]) -> int | None:
    """How many an attention has, None for what is none that says how many query heads read one."""
    width, groups = getattr(attention, "head_dim", None), getattr(attention, _GROUPS, None)
    if not isinstance(groups, int):
        return None
    keys: Any = next((without_peft(getattr(attention, leaf)) for leaf in own if leaf[0] == "k"), None)
    if isinstance(keys, nn.Linear) and isinstance(width, int) and keys.out_features % width == 0:
        return keys.out_features // width
    heads = config_value(model, "num_key_value_heads")
    return heads if isinstance(heads, int) else None


def _sharing(name: str, style: Any, heads: int) -> KeyValueColwiseParallel:
    if type(style) not in (ColwiseParallel, ColwiseParallelLora) or not style.use_local_output:
        raise ValueError(
            f"{name} has {type(style).__name__}, but {heads} heads are shared by ranks only under ColwiseParallel with "
            "a plain output"
        )
    return KeyValueColwiseParallel(heads, input_layouts=style.input_layouts[0])


def _with_numbers(style: ParallelStyle | None, heads: int, copies: int) -> ParallelStyle:
    """The attention's style, and the numbers of a rank."""
    others: list[ParallelStyle] = []
    attributes: list[str] = []
    config: list[str] = []
    by: dict[str, int] = {}
    for part in each(style):
        if not isinstance(part, HeadsPerRank):
            others.append(part)
            continue
        attributes += [name for name in part.attributes if name not in _HEADS]
        config += part.config
        by |= part.by | {name: heads for name in part.attributes if name in _HEADS}
    return Several(*others, HeadsPerRank(attributes, config, by=by | {_GROUPS: copies}))
