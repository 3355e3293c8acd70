"""Apply a plan: expand it, check it against the model and the axis, then shard."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from am_tp_plans.config import config_value
from am_tp_plans.proof.check import check_seeds
from am_tp_plans.proof.read_outputs import refuse_parts
from am_tp_plans.proof.rehearsal import rehearse
from am_tp_plans.sources.registry import is_family
from am_tp_plans.styles.basic import (
    SequenceGatherOutput,
    VocabParallelEmbedding,
    each,
    is_open_colwise,
    shards_sequence,
)
from am_tp_plans.styles.experts import ExpertsOverTensorAxis
from am_tp_plans.styles.fused import Conv1DRowwiseParallel, PackedColwiseParallel, features
from am_tp_plans.styles.heads import HeadsError, share_key_value_heads, shares_heads
from am_tp_plans.styles.random_numbers import check_dropout, draw_for_shares
from am_tp_styles import translate_to_lora
from am_tp_styles.axis import MeshAxis
from am_tp_styles.layout import base_layer, has_own_adapter, is_wrapped
from am_tp_styles.parameters import refuse_hooks
from am_tp_styles.summed_together import sum_gradients_together


def apply_plan(model: nn.Module, tp_mesh: DeviceMesh, plan: dict[str, ParallelStyle]) -> nn.Module:
    """Shard a model over a tensor-parallel axis, in place; gradients are right when `backward()` returns.

    Tied weights stay one parameter. `model.sequence_shards` says over how many ranks the sequence is sharded between
    layers, `model.whole_outputs` which layers return it whole all the same.

    Args:
        model: real, with the same weights on every rank, or on the meta device. It may be a pipeline part, whose absent
            modules are leaves without parameters; keys for those are passed over. Of a model that peft wraps, give
            what `get_base_model()` returns; its linears may be wrapped.
        tp_mesh: one-dimensional.
        plan: from `resolve_plan`, or your own.

    Returns:
        The model.

    Collectives: with real weights a scatter or broadcast per parameter from the axis's first rank; then those of the
        styles.

    Raises:
        ValueError: a key matches nothing, heads or features do not divide over the axis, ranks would share key/value
            heads in an attention that no rehearsal shows to be right, tied weights would be sharded differently, a
            module is sharded already, a parameter has a hook on its gradient, the model has dropout and the ranks have
            different seeds, or dropout of a whole sequence between parts of it; on every rank alike, before anything is
            sharded.
        TypeError: a colwise or rowwise style is given to a module that is no linear and no embedding.
    """
    if tp_mesh.ndim != 1:
        raise ValueError(f"tp_mesh must have one axis, got {tp_mesh.mesh_dim_names}")
    refuse_hooks(model, [name for name, _ in model.named_parameters()])
    concrete = fit_plan(model, plan, tp_mesh.size())
    if tp_mesh.size() > 1:
        check_dropout(model, concrete)
    check_seeds(model, tp_mesh)
    tied = _tied_weights(model)
    for name, style in concrete.items():
        # a copy, because torch writes src_data_rank into the style, and the plan is the caller's
        parallelize_module(model.get_submodule(name), tp_mesh, copy.copy(local_form(style)))
    _tie_again(model, tied)
    sum_gradients_together(model, MeshAxis(tp_mesh))
    shards = any(map(shards_sequence, plan.values()))
    draw_for_shares(model, concrete, MeshAxis(tp_mesh), shards_sequence=shards)
    model.sequence_shards = tp_mesh.size() if shards else 1
    model.whole_outputs = tuple(name for name, style in plan.items() if isinstance(style, SequenceGatherOutput))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(_keep)
    if tp_mesh.size() > 1:
        refuse_parts(model, {**plan, **concrete})  # a pipeline part may lack the layer in which a plan splits
    if shards and tp_mesh.size() > 1 and hasattr(model, "generate"):
        cast(Any, model).generate = functools.partial(_refuse_to_generate, type(model).__name__)
    return model


def _keep(_module: nn.Module, _inputs: Any, _output: Any) -> None:
    """Changes nothing; torch runs no fused kernel for inference, which takes whole weights, where a layer has hooks."""


def _refuse_to_generate(name: str, *_args: Any, **_kwargs: Any) -> None:
    raise RuntimeError(
        f"{name} cannot generate while its sequence is sharded between layers: one new token does not divide. "
        "Lay it out without sequence parallelism, or write a folder (am_fsdp.save_hf_weights) and generate from it"
    )


def local_form(style: ParallelStyle) -> ParallelStyle:
    """A style of torch's that shards a module, in the form that computes on plain local tensors; others as they are."""
    sharding = isinstance(style, (ColwiseParallel, RowwiseParallel, SequenceParallel))
    return cast(ParallelStyle, translate_to_lora(style)) if sharding else style


def fit_plan(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> dict[str, ParallelStyle]:
    """The plan for an axis of so many ranks, without wildcards, checked as `apply_plan` does; it changes nothing.

    Where an attention has fewer key/value heads than there are ranks, it says which ranks share one. `apply_plan` does
    this by itself; of a model that no family here knows, the parts of a pipeline need the plan that was fitted to the
    whole model, because nothing can be shown on a part.

    Raises:
        ValueError: as `apply_plan`.
        TypeError: as `apply_plan`.
    """
    concrete = check_plan(model, plan, ranks)
    _prove_shared_heads(model, plan, concrete, ranks)
    return concrete


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
    _check_ties(model, _tied_weights(model), concrete)
    modules = {name: model.get_submodule(name) for name in concrete}
    adapted = {name: concrete[name] for name, m in modules.items() if is_wrapped(m) or has_own_adapter(m)}
    concrete.update(cast(dict, translate_to_lora(adapted)))
    return concrete


def _prove_shared_heads(
    model: nn.Module, given: dict[str, ParallelStyle], concrete: dict[str, ParallelStyle], ranks: int
) -> None:
    """Rehearse the plan if ranks share heads: an attention may count them in a way of its own.

    Not for the families here, whose attentions are known, nor on a part of a pipeline whose plan says it itself.
    """
    sharing = [name for name, style in concrete.items() if shares_heads(style)]
    explicit = any(map(shares_heads, given.values()))
    if not sharing or (not explicit and is_family(model)):
        return
    if is_part(model):
        if explicit:
            return
        raise ValueError(
            f"{sharing[0]} has fewer key/value heads than the {ranks} ranks, and this {type(model).__name__} is a part "
            f"of a cut model, on which nothing can be shown; give the parts fit_plan(model, plan, {ranks}) of the whole"
        )
    rehearse(model, concrete, ranks)


def expand_plan(model: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The plan with `*` (one level of a name) replaced by the modules there are, in the model's order.

    A module named by several keys takes the last. Modules without parameters that stand where a pipeline cut left
    them out are passed over.

    Raises:
        ValueError: a key matches nothing, and nothing that was left out could be what it means.
    """
    modules = dict(model.named_modules())
    absent = [name for name, module in modules.items() if name and _is_placeholder(module)]
    matched: dict[str, ParallelStyle] = {}
    for key, style in plan.items():
        pattern = re.compile(key.replace(".", r"\.").replace("*", r"[^.]+"))
        names = [name for name in modules if pattern.fullmatch(name)]
        if not names and not any(_may_mean(key, name) for name in absent):
            raise ValueError(
                f"the plan's key {key!r} matches no module of {type(model).__name__}; {_nearest(key, modules)}"
            )
        matched |= {name: style for name in names if name not in absent}
    return {name: matched[name] for name in modules if name in matched}


def _is_placeholder(module: nn.Module) -> bool:
    """Whether a module stands for one that a pipeline cut left out: nothing in it, and no layer of torch's own."""
    if any(True for group in (module.children(), module.parameters(), module.buffers()) for _ in group):
        return False
    return isinstance(module, nn.Identity) or not type(module).__module__.startswith("torch.nn.")


def is_part(model: nn.Module) -> bool:
    """Whether a pipeline cut left layers out: some of a list have parameters, others have nothing."""
    for module in model.modules():
        # layers have modules in them; an activation between two linears, in a list of the three, was always there
        if isinstance(module, nn.ModuleList) and any(True for layer in module for _ in layer.children()):
            empty = [_is_left_out(layer) for layer in module]
            if any(empty) and not all(empty):
                return True
    return False


def _is_left_out(layer: nn.Module) -> bool:
    """Whether it stands where a layer was, which has nothing in it."""
    return not any(True for _ in layer.parameters()) and not any(True for _ in layer.children())


def _may_mean(key: str, absent: str) -> bool:
    """Whether a key names a module that was left out, or something inside it."""
    levels = key.split(".")[: absent.count(".") + 1]
    return re.fullmatch(".".join(levels).replace(".", r"\.").replace("*", r"[^.]+"), absent) is not None


def _nearest(key: str, modules: dict[str, nn.Module]) -> str:
    leaf = key.rpartition(".")[2]
    same = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in modules if n.rpartition(".")[2] == leaf})
    return f"modules of that name are {same}" if same else f"there is no module called {leaf!r}"


def _shards_attention(key: str, style: ParallelStyle) -> bool:
    """Whether ranks have heads of their own: not where projections gather what they computed."""
    owner = key.rpartition(".")[0].rpartition(".")[2]
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
            raise TypeError(
                f"{name} is a {type(module).__name__}, but {type(style).__name__} is for nn.Linear and nn.Embedding; "
                "name the linears inside it"
            )
        colwise = isinstance(style, ColwiseParallel)
        what = "output features" if colwise else "input features"
        number = module.weight.shape[_sharded_dim(module, style) or 0]
        if isinstance(module, nn.Embedding):
            what = "columns" if colwise else "rows"
    elif isinstance(style, (PackedColwiseParallel, Conv1DRowwiseParallel)):
        widths = features(module)
        if widths is None:
            raise TypeError(f"{name} is a {type(module).__name__}, but {type(style).__name__} is for linears")
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


def _may_be_uneven(style: ParallelStyle) -> bool:
    """Whether no module sees how many features or rows a rank has: a vocabulary's."""
    if isinstance(style, VocabParallelEmbedding):
        return True
    return isinstance(style, ColwiseParallel) and (
        isinstance(style.output_layouts[0], Replicate) or not style.use_local_output
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _tied_weights(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _check_ties(model: nn.Module, tied: list[list[str]], plan: dict[str, ParallelStyle]) -> None:
    """A tied embedding and head must both shard the vocabulary, or neither be sharded."""
    for group in tied:
        owners = {name: name.rpartition(".")[0] for name in group}
        dims = {name: _sharded_dim(model.get_submodule(owner), plan.get(owner)) for name, owner in owners.items()}
        if len(set(dims.values())) > 1:
            raise ValueError(f"{' and '.join(group)} are one parameter, but the plan shards them differently: {dims}")


def _sharded_dim(module: nn.Module, style: ParallelStyle | None) -> int | None:
    """The dim of `module.weight` that the style shards: an embedding is laid out the other way round than a linear."""
    if isinstance(style, (ColwiseParallel, RowwiseParallel)):
        return int(isinstance(style, ColwiseParallel) == isinstance(base_layer(module), nn.Embedding))
    return None


def _tie_again(model: nn.Module, tied: list[list[str]]) -> None:
    for first, *others in tied:
        parameter = model.get_parameter(first)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            other = model.get_parameter(name)
            if isinstance(other, DTensor) != isinstance(parameter, DTensor):
                raise ValueError(f"{first} and {name} are one parameter, but the plan shards only one of them")
            model.get_submodule(owner).register_parameter(leaf, parameter)
