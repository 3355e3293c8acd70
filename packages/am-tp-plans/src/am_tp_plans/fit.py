"""Whether a plan fits a model and the size of an axis: heads, features, tied weights. It changes nothing."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from am_tp_plans.adapters import known_as, why_not_sharded
from am_tp_plans.config import config_value
from am_tp_plans.expand import expand_plan
from am_tp_plans.styles.basic import VocabParallelEmbedding, each, is_open_colwise
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, PackedColwiseParallel, features
from am_tp_plans.styles.heads import HeadsError, share_key_value_heads, shares_heads
from am_tp_styles import translate_to_lora
from am_tp_styles.layout import base_layer, has_own_adapter, is_wrapped


def check_plan(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> dict[str, ParallelStyle]:
    """`fit_plan`, without the rehearsal of attentions whose key/value heads are shared."""
    try:
        return _checked(model, plan, ranks)
    except HeadsError as error:
        heads = config_value(model, "num_attention_heads") or ranks
        sizes = [size for size in _divisors(heads) if _fits(model, plan, size)]
        raise ValueError(f"{error}; an axis can have {sizes}") from error


def _fits(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> bool:
    try:
        return bool(_checked(model, plan, ranks))
    except ValueError:
        return False


def _checked(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> dict[str, ParallelStyle]:
    """With LoRA styles where adapters are."""
    attention = any(_shards_attention(key, style) for key, style in plan.items())
    if attention:
        _check_query_heads(model, ranks)
    concrete = share_key_value_heads(model, expand_plan(model, plan), ranks)
    if attention:
        _check_key_value_heads(model, concrete, ranks)
    for name, styles in concrete.items():
        for style in each(styles):
            _check_features(name, model.get_submodule(name), style, ranks)
    _check_ties(model, tied_weights(model), concrete)
    modules = {name: model.get_submodule(name) for name in concrete}
    adapted = {name: concrete[name] for name, m in modules.items() if is_wrapped(m) or has_own_adapter(m)}
    concrete.update(cast(dict, translate_to_lora(adapted)))
    return concrete


def _shards_attention(key: str, style: ParallelStyle) -> bool:
    """Whether ranks have heads of their own: not where projections gather what they computed."""
    owner = known_as(key).rpartition(".")[0].rpartition(".")[2]
    return is_open_colwise(style) and ("attn" in owner or "attention" in owner)


def _check_query_heads(model: nn.Module, ranks: int) -> None:
    heads = config_value(model, "num_attention_heads")
    if isinstance(heads, int) and heads % ranks:
        raise HeadsError(f"num_attention_heads={heads} does not divide over {ranks} tensor-parallel ranks")


def _check_key_value_heads(model: nn.Module, concrete: dict[str, ParallelStyle], ranks: int) -> None:
    heads = config_value(model, "num_key_value_heads")
    if not isinstance(heads, int) or heads % ranks == 0 or any(map(shares_heads, concrete.values())):
        return
    if ranks % heads or any(_shards_attention(name, style) for name, style in concrete.items()):
        raise HeadsError(f"num_key_value_heads={heads} does not divide over {ranks} tensor-parallel ranks")


def _check_features(name: str, module: Any, style: ParallelStyle, size: int) -> None:
    if isinstance(style, (ColwiseParallel, RowwiseParallel)) and (why := why_not_sharded(name, module)):
        raise TypeError(f"{why} ({type(style).__name__})")
    module = base_layer(module)
    if any(isinstance(p, DTensor) for p in module.parameters(recurse=False)):
        raise ValueError(f"{name} is sharded already; a plan is applied once, to a model of plain tensors")
    if isinstance(module, nn.Linear) and tuple(module.weight.shape) != (module.out_features, module.in_features):
        raise ValueError(
            f"{name}.weight is packed (quantised) into shape {tuple(module.weight.shape)}, whose rows are no features; "
            "tensor parallelism cannot shard it, FSDP2 can"
        )
    if isinstance(style, ExpertsOverTensorAxis):
        what, number = "experts", getattr(module, "num_experts", 0)
        if not number or not all(p.shape[0] == number for p in module.parameters(recurse=False)):
            raise ValueError(f"{name} is no module of stacked experts, but the plan shards its experts")
    elif shares_heads(style):
        style.layout(module, size)
        return
    elif isinstance(style, (ColwiseParallel, RowwiseParallel)):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise TypeError(no_linear(name, module, style))
        colwise = isinstance(style, ColwiseParallel)
        what = "output features" if colwise else "input features"
        number = module.weight.shape[_sharded_dim(module, style) or 0]
        if isinstance(module, nn.Embedding):
            what = "columns" if colwise else "rows"
    elif isinstance(style, (PackedColwiseParallel, Conv1DRowwiseParallel)):
        widths = features(module)
        if widths is None:
            raise TypeError(no_linear(name, module, style))
        what = "output features" if isinstance(style, PackedColwiseParallel) else "input features"
        parts = style.widths(widths[1]) if isinstance(style, PackedColwiseParallel) else [widths[0]]
        number = next((part for part in parts if part % size), size)
    else:
        return
    if _may_be_uneven(style) and -(-number // size) * (size - 1) < number:
        return  # the last ranks have less, but something
    if number % size:
        sizes = f"an axis can have {_divisors(number)}"
        raise ValueError(f"the {number} {what} of {name} do not divide over {size} ranks; {sizes}")


def no_linear(name: str, module: nn.Module, style: ParallelStyle) -> str:
    kinds = "nn.Linear and nn.Embedding" if isinstance(style, (ColwiseParallel, RowwiseParallel)) else "linears"
    return f"{name} is a {type(module).__name__}, but {type(style).__name__} is for {kinds}; name the linears inside it"


def _may_be_uneven(style: ParallelStyle) -> bool:
    """Whether no module sees how many features or rows a rank has: a vocabulary's."""
    if isinstance(style, VocabParallelEmbedding):
        return True
    return isinstance(style, ColwiseParallel) and (
        isinstance(style.output_layouts[0], Replicate) or not style.use_local_output
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def tied_weights(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that several modules have."""
    names: dict[int, list[str]] = {}
    for owner, module in model.named_modules():  # a module that has several names is there once
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{owner}.{leaf}" if owner else leaf)
    return [group for group in names.values() if len(group) > 1]


def _check_ties(model: nn.Module, tied: list[list[str]], plan: dict[str, ParallelStyle]) -> None:
    """A tied embedding and head must both shard the vocabulary, or neither be sharded."""
    for group in tied:
        owners = {name: name.rpartition(".")[0].removesuffix(".base_layer") for name in group}
        dims = {name: _sharded_dim(model.get_submodule(owner), plan.get(owner)) for name, owner in owners.items()}
        if len(set(dims.values())) > 1:
            raise ValueError(f"{' and '.join(group)} are one parameter, but the plan shards them differently: {dims}")


def _sharded_dim(module: nn.Module, style: ParallelStyle | None) -> int | None:
    """The dim of `module.weight` that the style shards: an embedding is laid out the other way round than a linear."""
    if isinstance(style, (ColwiseParallel, RowwiseParallel)):
        return int(isinstance(style, ColwiseParallel) == isinstance(base_layer(module), nn.Embedding))
    return None
