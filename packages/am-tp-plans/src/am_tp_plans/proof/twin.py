"""A small model of the same class as the user's, to run a plan with real numbers: built from its config, made small.

A layer of every kind is kept, and the first and the last; heads keep their grouping and their width, all other widths
and the vocabulary shrink. What comes of it must have the modules that the model has, or there is no twin.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans._torch_compat import hook_dicts
from am_tp_plans.stacks import largest_stack, stacks_of
from am_tp_plans.styles.basic import describe
from am_tp_plans.styles.fused import PackedColwiseParallel, features

# Parameters of a model that is its own twin, and of the largest twin.
_SMALL, _LARGEST = 3_000_000, 30_000_000
# What an integer of a config means, by the names that transformers gives it.
_NAMES = {
    "layers": "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks",
    "heads": "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads attention_heads",
    "key heads": "num_key_value_heads num_kv_heads n_head_kv multi_query_group_num",
    "width": "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim dim",
    "inner width": "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff n_inner "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "intermediate_size_mlp dense_intermediate_size hidden_dim",
    "vocabulary": "vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    "experts": "num_experts n_routed_experts num_local_experts moe_num_experts",
    "chosen experts": "num_experts_per_tok num_experts_per_token moe_k moe_topk",
    "groups of experts": "n_group num_expert_group",
}


class NoTwinError(Exception):
    """There is no small model to run, and why."""


@dataclass(frozen=True)
class Twin:
    """A small model on the CPU in evaluation mode, and what the plan is for its modules.

    Attributes:
        model: with random weights, in float32.
        plan: concrete, as `expand_plan` makes it.
    """

    model: nn.Module
    plan: dict[str, ParallelStyle]


def make_twin(model: nn.Module, concrete: dict[str, ParallelStyle], ranks: int) -> Twin:
    """A small model of `model`'s class that has a module of every kind that the plan has a style for.

    Args:
        model: real or on meta; it is not changed, and its weights are read only if it has no config.
        concrete: its plan, without `*`.
        ranks: that heads and widths of the twin divide over.

    Raises:
        NoTwinError: the class cannot be built from a config alone, or what comes of it is another model or too large.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    own = any(parameter.is_meta for parameter in (*model.parameters(), *model.buffers()))
    try:
        twin, names = _from_config(model, concrete, ranks, size)
    except NoTwinError:
        if own or size > _SMALL:
            raise
        twin = _copy(model)
        names = {name: name for name, _ in twin.named_modules()}
    plan = {
        name: _resized(concrete[of], model.get_submodule(of), twin.get_submodule(name))
        for name, of in names.items()
        if of in concrete
    }
    return Twin(_with_random_weights(twin).eval(), plan)


def _from_config(
    model: nn.Module, concrete: dict[str, ParallelStyle], ranks: int, size: int
) -> tuple[nn.Module, dict[str, str]]:
    """The twin, and the names of its modules with those of the model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise NoTwinError(f"{type(model).__name__} has no config to build a small one from")
    config = copy.deepcopy(config)
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):  # kernels that the CPU has not
        config._attn_implementation = "sdpa"
    if size <= _SMALL:
        twin = _built(model, config, "cpu")
        return twin, _same_modules(model, twin, {}, equal=True)
    stacks, count = _stacks(model)
    kinds = list(zip(*(_kinds(model, stack, concrete) for stack in stacks), strict=True))
    why = NoTwinError(f"no {type(model).__name__} with few layers has one of every kind")
    for kept in _choices(kinds, config):
        try:
            small = _shrunk(config, ranks, count, kept)
            outline = _built(model, small, "meta")
            names = _same_modules(model, outline, dict.fromkeys(stacks, kept), equal=False)
            _check_other_lists(model, outline, stacks, concrete)
        except NoTwinError as error:
            why = error
            continue
        held = sum(parameter.numel() for parameter in outline.parameters())
        if held > _LARGEST:
            raise NoTwinError(f"the smallest {type(model).__name__} that could be made has {held:,} parameters")
        return _built(model, small, "cpu"), names
    raise why


def _built(model: nn.Module, config: Any, device: str) -> nn.Module:
    try:
        with torch.device(device):
            return type(model)(config)
    except Exception as error:  # whatever a class says to a config of other sizes
        raise NoTwinError(
            f"a small {type(model).__name__} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error


def _copy(model: nn.Module) -> nn.Module:
    """A copy with its own weights and without the user's hooks."""
    memo: dict[int, Any] = {id(hooks): type(hooks)() for m in model.modules() for hooks in hook_dicts(m)}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value.detach().clone().cpu()
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone().cpu())
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever its attributes say to a copy
        raise NoTwinError(f"{type(model).__name__} cannot be copied: {error}") from error


def _stacks(model: nn.Module) -> tuple[list[str], int]:
    """The stack with the most parameters and those as long as it, which a config counts alike; the length."""
    largest = largest_stack(model)
    if largest is None:
        raise NoTwinError(f"{type(model).__name__} is large and has no list of layers")
    stacks = stacks_of(model)
    count = len(stacks[largest])
    return [name for name, layers in stacks.items() if len(layers) == count], count


def _kinds(model: nn.Module, stack: str, concrete: dict[str, ParallelStyle]) -> list[tuple]:
    layers: Any = model.get_submodule(stack)
    return [_kind(layer, f"{stack}.{index}", concrete) for index, layer in enumerate(layers)]


def _check_other_lists(
    model: nn.Module, twin: nn.Module, stacks: list[str], concrete: dict[str, ParallelStyle]
) -> None:
    """A list that shrank as well, such as one of experts, must be of one kind."""
    for name, module in twin.named_modules():
        of = next((stack for stack in stacks if name == stack or name.startswith(f"{stack}.")), None)
        if isinstance(module, nn.ModuleList) and of is None:
            kinds = _kinds(model, name, concrete)
            if len(kinds) != len(module) and len(set(kinds)) > 1:
                raise NoTwinError(f"{name} of a small {type(model).__name__} is shorter, and its modules differ")


def _kind(layer: nn.Module, prefix: str, concrete: dict[str, ParallelStyle]) -> tuple:
    """What tells a layer from others: its modules, their settings that are no sizes, and their styles."""
    found = []
    for name, module in layer.named_modules():
        settings = [(key, v) for key, v in vars(module).items() if isinstance(v, (bool, str)) and key != "training"]
        own = tuple(leaf for leaf, _ in module.named_parameters(recurse=False))
        style = describe(concrete.get(f"{prefix}.{name}" if name else prefix))
        found.append((name, _class(module), own, tuple(sorted(settings)), style))
    return tuple(found)


def _choices(kinds: list[tuple], config: Any) -> Iterator[list[int]]:
    """Layers to keep, fewest first: always the first, the last, and one of every kind."""
    count = len(kinds)
    needed = sorted({0, count - 1, *(kinds.index(kind) for kind in kinds)})  # of every kind the first
    listed = any(isinstance(value, (list, tuple)) and len(value) == count for value in _values(config))
    if listed:
        yield needed
    for kept in range(2, min(count, 12) + 1):  # where a layer's number says what kind it is
        layers = [*range(kept - 1), count - 1]
        if {kinds[layer] for layer in layers} == set(kinds):
            yield layers
    yield list(range(count))


def _values(config: Any) -> Iterator[Any]:
    for value in vars(config).values():
        yield value
        if hasattr(value, "to_dict"):
            yield from _values(value)


def _shrunk(config: Any, ranks: int, count: int, kept: list[int]) -> Any:
    """A config of the same class with few layers and small widths; its sub-configs likewise."""
    config = copy.copy(config)
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    change = {name: _shrunk(value, ranks, count, kept) for name, value in values.items() if hasattr(value, "to_dict")}
    numbers = {name: value for name, value in values.items() if type(value) is int and value > 0}
    change |= {name: len(kept) for name, value in _meaning("layers", numbers).items() if value == count}
    change |= {
        name: type(value)(value[layer] for layer in kept)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }
    change |= _narrower(numbers, ranks)
    change |= {name: min(value, 24 * ranks) for name, value in _meaning("inner width", numbers).items()}
    change |= _fewer_experts(numbers, ranks)
    ids = {name: ranks * (96 // ranks) + value % ranks for name, value in _meaning("vocabulary", numbers).items()}
    change |= {name: few for name, few in ids.items() if few < numbers[name]}
    for name, value in numbers.items():
        if ids and name.endswith("token_id"):
            change[name] = min(value, min(ids.values()) - 1)
    for name, value in change.items():
        setattr(config, name, value)
    return config


def _meaning(what: str, numbers: dict[str, int]) -> dict[str, int]:
    """The numbers of a config that mean this."""
    return {name: numbers[name] for name in _NAMES[what].split() if name in numbers}


def _narrower(numbers: dict[str, int], ranks: int) -> dict[str, int]:
    """Fewer heads in groups as large as before, and the hidden size that goes with them."""
    all_heads, key_heads = _meaning("heads", numbers), _meaning("key heads", numbers)
    widths = _meaning("width", numbers)
    if not all_heads or not widths:
        return {}
    heads, width = next(iter(all_heads.values())), next(iter(widths.values()))
    groups = next(iter(key_heads.values()), heads)
    fewer = min(groups, ranks * (2 if heads // groups < 8 else 1))
    if groups % fewer or heads * fewer % groups:
        fewer = groups
    narrower = min(width, 128) if "head_dim" in numbers else width * fewer // groups
    if narrower > 512:  # many heads of a width that is derived
        narrower = heads * fewer // groups * 16
    change = {name: value * fewer // groups for name, value in (all_heads | key_heads).items()}
    return change | {name: max(value * narrower // width, 1) for name, value in widths.items()}


def _fewer_experts(numbers: dict[str, int], ranks: int) -> dict[str, int]:
    if any(value > 1 for value in _meaning("groups of experts", numbers).values()):
        return {}
    chosen = max(_meaning("chosen experts", numbers).values(), default=1)
    few = -(-2 * chosen // ranks) * ranks
    return {name: few for name, value in _meaning("experts", numbers).items() if value > few}


def _same_modules(model: nn.Module, twin: nn.Module, kept: dict[str, list[int]], equal: bool) -> dict[str, str]:
    """The name in the model of every module of the twin, whose classes and parameters' names must agree."""
    modules, names = dict(model.named_modules()), {}
    for name, module in twin.named_modules():
        names[name] = of = _name_in_model(name, kept)
        other = modules.get(of)
        if other is not None and "forward" in vars(other):
            raise NoTwinError(f"{of or type(model).__name__} has a forward put on itself, which its class has not")
        if other is None or _class(other) != _class(module) or _shapes(other, equal) != _shapes(module, equal):
            has = f"a {type(other).__name__} for {of}" if other is not None else f"no {of}"
            raise NoTwinError(f"a {type(model).__name__} of its config is another model: {has} is not what it has")
        if not isinstance(module, nn.ModuleList) and {n for n, _ in module.named_children()} != {
            n for n, _ in other.named_children()
        }:
            raise NoTwinError(f"a {type(model).__name__} of its config has other modules in {of or 'it'}")
        if equal and len(list(module.children())) != len(list(other.children())):
            raise NoTwinError(f"a {type(model).__name__} of its config has another number of layers in {of}")
    return names


def _name_in_model(name: str, kept: dict[str, list[int]]) -> str:
    for stack, layers in kept.items():
        if name.startswith(f"{stack}."):
            index, dot, rest = name[len(stack) + 1 :].partition(".")
            return f"{stack}.{layers[int(index)]}{dot}{rest}" if int(index) < len(layers) else f"{stack}.none"
    return name


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _shapes(module: nn.Module, equal: bool) -> dict[str, Any]:
    return {name: tuple(p.shape) if equal else p.dim() for name, p in module.named_parameters(recurse=False)}


def _resized(style: ParallelStyle, module: nn.Module, small: nn.Module) -> ParallelStyle:
    """The style with the widths that fused projections have in the twin."""
    if not isinstance(style, PackedColwiseParallel) or isinstance(style.parts, int):
        return style
    was, now = features(module), features(small)
    if was is None or now is None or any(part * now[1] % was[1] for part in style.parts):
        raise NoTwinError(f"the fused projections {list(style.parts)} cannot be made smaller alike")
    resized = copy.copy(style)
    resized.parts = [part * now[1] // was[1] for part in style.parts]
    return resized


def _with_random_weights(model: nn.Module) -> nn.Module:
    """Weights of which none is zero or like another; gradients for all."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            if parameter.is_floating_point():
                scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                noise = torch.randn(parameter.shape, generator=random)
                parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return model
