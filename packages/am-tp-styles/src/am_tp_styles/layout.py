"""Which parameter of a layer goes where, as plain data: drawn up and checked before any collective.

How each style lays a layer over the tensor-parallel axis. The rank of a LoRA adapter is never sharded, so any rank
works with any number of devices::

    linear            column      row         sequence        embedding            rows        features
    weight (out, in)  Shard(0)    Shard(1)    Replicate       weight (ids, dim)    Shard(0)    Shard(1)
    bias (out,)       Shard(0)    Replicate   Replicate
    A (r, in)         Replicate   Shard(1)    Replicate       A (r, ids)           Shard(1)    Replicate
    B (out, r)        Shard(0)    Replicate   Replicate       B (dim, r)           Replicate   Shard(0)
    bias of B (out,)  Shard(0)    Replicate   Replicate
    magnitude (out,)  Shard(0)    Replicate   Replicate       magnitude (dim,)     Replicate   Shard(0)

A linear of fewer heads than ranks (`heads`) is replicated; a rank computes with the rows that `column` would shard.

Two forms of adapter are known by their structure:

- *own*: an `nn.Linear` with children `lora_A`, `lora_B` (linears) and, for DoRA, a parameter `lora_magnitude`;
- *wrapped*, peft's: a module with a `base_layer` beside `lora_A`, `lora_B` (a `ModuleDict` each, one linear per
  adapter), `lora_embedding_A`, `lora_embedding_B` (a `ParameterDict` each) and, for DoRA, `lora_magnitude_vector`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

_S0, _S1 = Shard(0), Shard(1)
# What is not listed is replicated.
_PLACEMENTS: dict[str, dict[str, Placement]] = {
    "column": {"weight": _S0, "bias": _S0, "B": _S0, "bias of B": _S0, "magnitude": _S0},
    "row": {"weight": _S1, "A": _S1},
    "sequence": {},
    "heads": {},
    "rows": {"weight": _S0, "A": _S1},
    "features": {"weight": _S1, "B": _S0, "magnitude": _S0},
}
_ROLES = {
    "lora_A": {"weight": "A", "bias": "bias of A"},
    "lora_B": {"weight": "B", "bias": "bias of B"},
    "lora_embedding_A": {"": "A"},
    "lora_embedding_B": {"": "B"},
    "lora_magnitude": {"": "magnitude"},
    "lora_magnitude_vector": {"weight": "magnitude"},
}
_KNOWN_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")


def plan_layout(module: nn.Module, kind: str, ranks: int) -> dict[str, Placement]:
    """The placement of every parameter of a linear or embedding, with or without adapters.

    Args:
        module: an `nn.Linear` or `nn.Embedding`, one with an adapter of its own, or peft's wrapper around one.
        kind: `column`, `heads`, `row` or `sequence` for a linear, `rows` or `features` for an embedding.
        ranks: size of the tensor-parallel axis.

    Returns:
        Parameter name, relative to `module`, to placement.

    Raises:
        TypeError: the adapter has another structure than the two above.
        ValueError: a dim does not divide over the ranks where it must, a rank would be left without any of it, a
            parameter is sharded already or of no known role, or an adapter is of a variant that is not linear in the
            weight. Issues no collective.
    """
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{type(module).__name__}.{name} is a DTensor already; shard a layer once, after its adapters are on it"
            )
    _check_shapes(base_layer(module), kind, ranks)
    if getattr(module, "merged", False):
        raise ValueError(f"{type(module).__name__} has merged adapters; unmerge them before it is sharded")
    return plan_added(module, kind)


def layout_of(module: nn.Module, kind: str) -> dict[str, Placement]:
    """The placement of every parameter by its role, of a layer that is sharded already, too."""
    return {
        name: _PLACEMENTS[kind].get(_role(module, name), Replicate())
        for name, _ in module.named_parameters(remove_duplicate=False)
    }


def plan_added(module: nn.Module, kind: str) -> dict[str, Placement]:
    """The part of `plan_layout` for parameters that are not sharded yet, which an added adapter brings."""
    _check_adapters(module)
    has_own_adapter(module)
    return {
        name: placement
        for name, placement in layout_of(module, kind).items()
        if not isinstance(module.get_parameter(name), DTensor)
    }


def has_rows_of_features(module: nn.Module, name: str) -> bool:
    """Whether dim 0 of a linear's parameter is that of the output features."""
    return _role(module, name) in _PLACEMENTS["column"]


def base_layer(module: Any) -> nn.Module:
    """The linear or embedding inside a wrapper, or the module itself."""
    return module.base_layer if is_wrapped(module) else module


def is_wrapped(module: Any) -> bool:
    """Whether `module` is an adapter layer in peft's form."""
    if isinstance(module, (nn.Linear, nn.Embedding)) or not isinstance(getattr(module, "base_layer", None), nn.Module):
        return False
    linear = [isinstance(getattr(module, name, None), nn.ModuleDict) for name in ("lora_A", "lora_B")]
    lookup = [isinstance(getattr(module, f"lora_embedding_{ab}", None), nn.ParameterDict) for ab in "AB"]
    return all(linear) or all(lookup)


def has_own_adapter(module: nn.Module) -> bool:
    """Whether a linear carries `lora_A` and `lora_B` itself; children that are no linears are an error."""
    children = {name: getattr(module, name, None) for name in ("lora_A", "lora_B")}
    if is_wrapped(module) or all(child is None for child in children.values()):
        return False
    for name, child in children.items():
        if not isinstance(child, nn.Linear):
            raise TypeError(
                f"{type(module).__name__}.{name} is a {type(child).__name__}; a layer that is a linear itself must "
                "hold nn.Linear children lora_A and lora_B, and one in peft's form must hold a base_layer"
            )
    return True


def _role(module: nn.Module, name: str) -> str:
    """What a parameter is to its layer, from its name: `lora_B.default.weight` is `B`."""
    parts = name.split(".")
    if not is_wrapped(module):
        default = name if name in ("weight", "bias") else "of the user's own"
        return _ROLES.get(parts[0], {}).get(".".join(parts[1:]), default)
    if parts[0] == "base_layer" and parts[1:] in (["weight"], ["bias"]):
        return parts[1]
    role = _ROLES.get(parts[0], {}).get(".".join(parts[2:]))  # the second part is the adapter's name
    if role is None:
        known = ", ".join(("base_layer.weight", "base_layer.bias", *_ROLES))
        raise ValueError(f"{type(module).__name__}.{name} has no known place in an adapter layer; known are {known}")
    return role


def _check_shapes(base: Any, kind: str, ranks: int) -> None:
    placement = _PLACEMENTS[kind].get("weight")
    if not isinstance(placement, Shard):
        return
    if isinstance(base, nn.Linear):
        shape, names = (base.out_features, base.in_features), ("out_features", "in_features")
    else:
        shape, names = (base.num_embeddings, base.embedding_dim), ("num_embeddings", "embedding_dim")
    weight = base.weight
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"{type(base).__name__}.weight has shape {tuple(weight.shape)}, not {shape}: a packed or already divided "
            "weight cannot be sharded"
        )
    size, name = shape[placement.dim], names[placement.dim]
    if kind == "row" and size % ranks:
        raise ValueError(f"{name}={size} does not divide over {ranks} ranks; a rowwise linear needs a multiple of it")
    if -(-size // ranks) * (ranks - 1) >= size:
        raise ValueError(f"{name}={size} leaves one of {ranks} ranks without a share; use fewer ranks")
    if kind == "rows":
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(base, option, None):
                raise ValueError(
                    f"an embedding with {option}={getattr(base, option)} cannot be sharded along its vocabulary; "
                    "shard its features (ColwiseParallelLora)"
                )


def _check_adapters(module: Any) -> None:
    for adapter, variant in (getattr(module, "lora_variant", None) or {}).items():
        if type(variant).__name__ not in _KNOWN_VARIANTS:
            raise ValueError(
                f"adapter {adapter!r} of {type(module).__name__} is a {type(variant).__name__}, which has no "
                "tensor-parallel form here; plain LoRA, rsLoRA and DoRA have one"
            )
    for adapter, magnitude in (getattr(module, "lora_magnitude_vector", None) or {}).items():
        if not hasattr(magnitude, "get_weight_norm"):
            raise ValueError(f"DoRA adapter {adapter!r} has no get_weight_norm, as peft 0.18 and later give it")
    if getattr(module, "fan_in_fan_out", False) and isinstance(base_layer(module), nn.Linear):
        raise ValueError(f"{type(module).__name__} has fan_in_fan_out=True; only (out, in) weights are sharded")
