# A copy of packages/am-fsdp/src/am_fsdp/layout/units.py, made by `nox -s copies`: edit that one.
"""Which modules become FSDP2 units: odd dtypes, the layers of every stack, and what stands before and after them."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


def units_of_another_dtype(
    model: nn.Module, mp_policy: MixedPrecisionPolicy, besides: Iterable[nn.Parameter] = ()
) -> list[tuple[list[nn.Module], MixedPrecisionPolicy]]:
    """The modules whose own parameters have another dtype than most of the model, and how they compute.

    FSDP2 wants one dtype in a unit. Each keeps its dtype and reduces gradients in float32 or wider. A head casts what
    it gets to its dtype; norms and the embedding cast what they return to that of the model, as the layers behind them
    need; others, such as routers, take and return what they do in one process. Where parameters keep their dtypes
    anyhow and all that are trained have the same, as adapters over a frozen model, nothing is a unit of its own.

    Args:
        model: a model or a part of it; nothing is changed.
        mp_policy: of the other units.
        besides: parameters that count nowhere, since they are on a mesh of their own.

    Returns:
        Units, inner ones first; modules that share parameters are one.

    Raises:
        ValueError: one module holds parameters of two dtypes itself, or trains another dtype than modules in it; or a
            parameter is a scalar or empty, which FSDP2 does not shard.
    """
    left_out = {id(p) for p in besides}
    for name, parameter in model.named_parameters():
        if id(parameter) not in left_out:
            _check_shape(name, parameter)
    trained = {p.dtype for p in model.parameters() if p.requires_grad and id(p) not in left_out}
    if mp_policy.param_dtype is None and len(trained) < 2:
        return []
    numbers: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        numbers[parameter.dtype] += parameter.numel()
    usual = max(numbers, key=lambda dtype: numbers[dtype], default=None)
    first, last = _held(model, "get_input_embeddings"), _held(model, "get_output_embeddings")
    units: list[list[nn.Module]] = []
    of_parameter: dict[int, list[nn.Module]] = {}
    for name, module in reversed(list(model.named_modules())):  # inner ones first: a unit takes all that is below it
        own = [p for p in module.parameters(recurse=False) if id(p) not in left_out]
        dtypes = {p.dtype for p in own}
        if len(dtypes) > 1:
            raise ValueError(f"{name} holds parameters of {sorted(map(str, dtypes))}; FSDP2 shards one dtype in a unit")
        if not dtypes or dtypes == {usual}:
            continue
        passed = of_parameter.keys() | left_out
        inside = {p.dtype for p in module.parameters() if p.requires_grad and id(p) not in passed}
        if len(inside) > 1:  # a unit takes all that is below it
            found = sorted(map(str, inside))
            raise ValueError(f"{name} and modules in it train {found}; FSDP2 shards one dtype in a unit")
        owners = next((of_parameter[id(p)] for p in own if id(p) in of_parameter), None)
        if owners is None:
            units.append(owners := [])
        owners.append(module)
        of_parameter |= {id(p): owners for p in own}
    return [(owners, _own_policy(owners, first, last, mp_policy.param_dtype or usual)) for owners in units]


def _check_shape(name: str, parameter: nn.Parameter) -> None:
    owner, _, own = name.rpartition(".")
    held = f"owner = model.get_submodule({owner!r}); owner.{own}"
    if parameter.dim() == 0:
        raise ValueError(
            f"{name} is a scalar, which FSDP2 does not shard; give it a dimension first: {held} = "
            f"torch.nn.Parameter(owner.{own}.detach()[None])"
        )
    if parameter.requires_grad and not parameter.numel():
        raise ValueError(
            f"{name} of {tuple(parameter.shape)} is empty, and FSDP2 cannot reduce its gradient; freeze it first: "
            f"{held}.requires_grad = False"
        )


def _own_policy(
    owners: list[nn.Module], first: nn.Module | None, last: nn.Module | None, usual: torch.dtype | None
) -> MixedPrecisionPolicy:
    dtype = next(p.dtype for module in owners for p in module.parameters(recurse=False))
    is_head = any(module is last for module in owners)
    feeds_layers = any(module is first or "norm" in type(module).__name__.lower() for module in owners)
    return MixedPrecisionPolicy(
        param_dtype=dtype if is_head else None,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        output_dtype=usual if feeds_layers else None,
        cast_forward_inputs=is_head,
    )


def edges(model: nn.Module, head: nn.Module | None = None) -> list[list[nn.Module]]:
    """What is a unit of its own besides layers: the token embedding; the final norm together with the head.

    Not what shares a parameter with another module, such as embedding and head, or the embeddings of two stacks (all
    stay in the root, which gathers it once); nothing where the model does not say which modules they are, or where a
    pipeline left them on another stage.

    Args:
        model: the model or a part of it.
        head: a head that is a unit already.
    """
    first, last = _held(model, "get_input_embeddings"), _held(model, "get_output_embeddings")
    units = [[first]] if first is not None else []
    norm = _final_norm(model, last) if last is not None else None
    after = [module for module in (norm, last) if module is not None and module is not head]
    names = _names_of_parameters(model)
    return [unit for unit in [*units, after] if unit and _shares_nothing(unit, names)]


def _held(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a method of the model returns, if there is one and it has parameters."""
    try:
        found = getattr(model, getter, lambda: None)()
    except NotImplementedError:  # transformers does not know either
        return None
    return found if isinstance(found, nn.Module) and any(True for _ in found.parameters()) else None


def _final_norm(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The one module with parameters of its own between the last stack and the head."""
    stacks = list(layer_stacks(model))
    after: list[nn.Module] = []
    for module in model.modules():
        if stacks and module is stacks[-1]:
            after = []
        elif module is head:
            break
        elif any(True for _ in module.parameters(recurse=False)):
            after.append(module)
    inside = {id(module) for stack in stacks for module in stack.modules()}
    after = [module for module in after if id(module) not in inside]
    return after[0] if len(after) == 1 and "norm" in type(after[0]).__name__.lower() else None


def layer_stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost `ModuleList`s below a module: decoder layers, those of towers and of prediction heads."""
    if isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from layer_stacks(child)


def stacks_of_units(model: nn.Module) -> list[list[nn.Module]]:
    """The layers of each stack that are units.

    Layers without parameters, which a pipeline leaves where another stage's were, are passed over; so are layers that
    share parameters with what is outside of them, and those that are run by `layer.forward(...)`, past the hooks that
    gather a unit (SqueezeBERT), which stay with the root.
    """
    found, names, hidden = [], _names_of_parameters(model), _run_past_hooks(model)
    for stack in layer_stacks(model):
        if id(stack) in hidden:
            continue
        some = [layer for layer in stack if any(True for _ in layer.parameters())]
        alone = [layer for layer in some if _shares_nothing([layer], names)]
        found.append([layer for layer in alone if not isinstance(layer, nn.ModuleList)])
    return found


def turn_off_caches(model: nn.Module) -> None:
    """Set `use_cache` to False in the config of every module: a layer that is recomputed would fill a cache twice.

    The stacks of an encoder-decoder hold copies of the model's config, the parts of a vision-language model their own.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _run_past_hooks(model: nn.Module) -> set[int]:
    """The stacks, by id, whose owner's forward calls that of something in it by name."""
    hidden: set[int] = set()
    for owner in model.modules():
        stacks = [id(child) for child in owner.children() if isinstance(child, nn.ModuleList)]
        try:
            source = inspect.getsource(inspect.unwrap(type(owner).forward)) if stacks else ""
        except (OSError, TypeError):  # it has no source, as in a shell
            continue
        if _CALLS_FORWARD.search(source):
            hidden.update(stacks)
    return hidden


# Neither `super().forward(` nor `self.forward(`, nor that of a class.
_CALLS_FORWARD = re.compile(r"(?<![\w.])(?!self\.forward)[a-z_][a-z0-9_.\[\]]*\.forward\(")


def _names_of_parameters(*modules: nn.Module) -> Counter[int]:
    """How many names each parameter has, by its id."""
    return Counter(id(p) for module in modules for _, p in module.named_parameters(remove_duplicate=False))


def _shares_nothing(unit: list[nn.Module], names: Counter[int]) -> bool:
    """Whether no parameter of these modules has a name elsewhere in the model: FSDP2 wants all of them in one unit."""
    return all(names[parameter] == number for parameter, number in _names_of_parameters(*unit).items())


def stack_names(model: nn.Module) -> list[str]:
    """The full names of the outermost `ModuleList`s with parameters."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(stack)] for stack in layer_stacks(model) if any(True for _ in stack.parameters())]
