"""Which models context parallelism is right for, by their structure; everything else is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from am_moe.context_parallel.prove import Known
from am_moe.context_parallel.rotary import tables_by_length
from am_moe.expert_parallel.experts import describe_experts

_ATTENTION = ("full_attention", "sliding_attention", "attention")
_MIXING = ("linear_attention", "conv", "hybrid")  # their mixers are found by what they hold
_POINTWISE = ("mlp", "moe")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def registry_attention(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules whose forward looks its attention function up in transformers' registry, with their names."""
    return [(name, module) for name, module in model.named_modules() if _uses_registry(module)]


def mixers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules in layers of a stack that mix tokens by recurrence or convolution, outermost ones, with their names.

    Those that own a `Conv1d`, which every linear attention and SSM of transformers has but lightning attention; that is
    known by its name and its config's layer types.
    """
    linear = any("linear_attention" in _layer_types(config) for config in configs_of(model))
    attention = {id(module) for _, module in registry_attention(model)}
    inside = {id(inner) for _, module in registry_attention(model) for inner in module.modules()}
    apart = {id(inner) for _, tower in towers(model) for inner in tower.modules()}
    found: list[tuple[str, nn.Module]] = []
    for stack, layers in model.named_modules():
        for index, layer in enumerate(layers if isinstance(layers, nn.ModuleList) and id(layers) not in apart else ()):
            for inner, module in layer.named_modules(prefix=f"{stack}.{index}".lstrip(".")):
                if module is layer or id(module) in attention or any(inner.startswith(f"{n}.") for n, _ in found):
                    continue
                convolves = any(isinstance(child, (nn.Conv1d, nn.RNNBase)) for child in module.children())
                if convolves or (linear and id(module) not in inside and _attends_by_itself(module)):
                    found.append((inner, module))
    return list({id(module): (name, module) for name, module in found}.values())


def towers(model: Any) -> list[tuple[str, nn.Module]]:
    """What makes hidden states of images and sounds, with names: has convolutions and stands beside the embedding."""
    try:
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # transformers does not know: whatever has convolutions is then refused to run
        embedding = None
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, CONVOLUTIONS):
            continue
        while (parent := name.rpartition(".")[0]) and embedding not in set(model.get_submodule(parent).modules()):
            name = parent
        if not isinstance(model.get_submodule(name), nn.ModuleList):  # that would be the stack of the tokens' layers
            found[name] = model.get_submodule(name)
    return list(found.items())


def engine_attention(model: nn.Module) -> list[tuple[str, Any]]:
    """Transformer Engine's attention modules, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == "DotProductAttention" and hasattr(module, "set_context_parallel_group")
    ]


def configs_of(model: nn.Module) -> list[Any]:
    """Every config that a module of the model holds, once."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def configs_besides_towers(model: nn.Module) -> list[Any]:
    """The configs of what runs on a rank's tokens; towers keep their attention, as they run whole on every rank."""
    apart = {id(inner) for _, tower in towers(model) for inner in tower.modules()}
    own = {id(m.config) for m in model.modules() if id(m) not in apart and hasattr(m, "config")}
    return [config for config in configs_of(model) if id(config) in own]


def dropout_of_towers(model: nn.Module, stack: str) -> str | None:
    """The first module or setting before a model's stack that drops values in training, by name; None for none."""
    for name, module in model.named_modules():
        if (
            isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
            and module.p > 0
            and not name.startswith(f"{stack}.")
        ):
            return name
    besides = configs_besides_towers(model)
    for config in configs_of(model):
        for field, value in vars(config).items() if all(config is not other for other in besides) else ():
            if "drop" in field and isinstance(value, float) and value > 0:
                return f"{type(config).__name__}.{field}"
    return None


def known_modules(model: nn.Module) -> Known:
    """The modules that a reading does not look into, because context parallelism knows what they do with tokens."""
    apart = {id(inner) for _, tower in towers(model) for inner in tower.modules()}
    mixing = [name for name, _ in mixers(model)]
    attention = [name for name, module in registry_attention(model) if id(module) not in apart]
    tables = {id(module) for module in tables_by_length(model)}
    experts = describe_experts(model)
    return Known(
        _stack_of(model, [*attention, *mixing]),
        tuple(mixing),
        tuple(name for name, module in model.named_modules() if id(module) in tables),
        tuple(e.name if e.call != "linear" else e.name.rpartition(".")[0] for e in experts),
    )


def _stack_of(model: nn.Module, names: list[str]) -> str:
    """The innermost module that holds all these and is called: no list of layers, and nothing within one."""
    paths = [name.split(".") for name in names]
    common: list[str] = []
    for level in zip(*paths, strict=False):
        inner = ".".join([*common, level[0]])
        if len(set(level)) > 1 or isinstance(model.get_submodule(inner), nn.ModuleList):
            break
        common.append(level[0])
    return ".".join(common)


def is_part_of_pipeline(model: nn.Module) -> bool:
    """Whether stand-ins are in the place of modules that other stages have: its forward is not a whole one."""
    return any("boundary" in vars(module) for module in model.modules())


def check_supported(model: nn.Module) -> None:
    """Refuse a model in which tokens meet other than in attention that the registry serves.

    Raises:
        ValueError: names the model, the module or setting, and why.
    """
    name = type(model).__name__
    attention = [module for _, module in registry_attention(model)]
    # A pipeline part may hold mixers alone.
    if not attention and (not mixers(model) or _by_signature(model)):
        raise ValueError(
            f"{name} has no attention that looks its function up in transformers' registry (ALL_ATTENTION_FUNCTIONS), "
            "and none of Transformer Engine; context parallelism has nothing to take the place of"
        )
    reason = _by_config(model) or _by_modules(model, attention) or _by_layers(model, attention) or _by_signature(model)
    if reason:
        raise ValueError(f"context parallelism is not right for {name}: {reason}")


def _by_config(model: nn.Module) -> str | None:
    known = (*_ATTENTION, *_MIXING, *_POINTWISE)
    for config in configs_of(model):
        if getattr(config, "is_encoder_decoder", False):
            return "it has an encoder and a decoder, and its cross-attention would need another sequence's keys"
        other = sorted(set(_layer_types(config)) - set(known))
        if other:
            return f"its config has layers of type {', '.join(other)}; only {', '.join(known)} are known"
    return None


def _by_modules(model: nn.Module, attention: list[nn.Module]) -> str | None:
    mixing, apart = [m for _, m in mixers(model)], [m for _, m in towers(model)]
    within = {id(inner) for module in (*mixing, *apart) for inner in module.modules()}
    served = within | {id(inner) for module in attention for inner in module.modules()}
    holding = {id(m) for m in model.modules() if any(inner in mixing for inner in m.modules())}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.RNNBase) and id(module) not in within:
            return f"{name} ({kind}) is recurrent"
        if isinstance(module, CONVOLUTIONS) and id(module) not in within:
            return f"{name} ({kind}) is a convolution, which mixes neighbouring tokens, in attention or in no stack"
        if "crossattention" in kind.lower():
            return f"{name} ({kind}) attends to another sequence"
        if id(module) not in served | holding and _attends_by_itself(module):
            return f"{name} ({kind}) computes attention by itself, without the registry"
        if hasattr(module, "create_position_ids_from_input_ids"):
            return f"{name} ({kind}) counts positions from its padding token's id, not from 0"
    return None


def _by_layers(model: nn.Module, attention: list[nn.Module]) -> str | None:
    """Every layer of a stack that mixes tokens does so in a known way, or is said to be pointwise by its config."""
    mixing = {id(module) for module in (*attention, *(m for _, m in mixers(model)))}
    types = [kind for config in configs_of(model) for kind in _layer_types(config)]
    pointwise = sum(kind in _POINTWISE for kind in types)
    for name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        without = [index for index, layer in enumerate(stack) if not any(id(m) in mixing for m in layer.modules())]
        # A layer without parameters of another kind than attention may have been left empty by a pipeline.
        unknown = [index for index in without if any(True for _ in stack[index].parameters())]
        if len(without) < len(stack) and len(unknown) > pointwise:
            layer = type(stack[unknown[0]]).__name__
            return f"{name}.{unknown[0]} ({layer}) has neither attention that the registry serves nor a known mixer"
    return None


def _attends_by_itself(module: nn.Module) -> bool:
    own = "attention" in type(module).__name__.lower() and any(True for _ in module.parameters())
    return own and not any(_uses_registry(inner) for inner in module.modules())


def _layer_types(config: Any) -> tuple[str, ...]:
    return tuple(getattr(config, "layer_types", None) or ())


def _by_signature(model: nn.Module) -> str | None:
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no position_ids, so a part of a sequence cannot be told where it lies"
    return None


def _uses_registry(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
