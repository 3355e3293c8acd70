"""Classes exchanged under modules that already exist, and back again."""

from __future__ import annotations

import functools
import types
from functools import cache
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


_FROM = "_am_tp_styles_exchanged_from"
_HOW = "_am_tp_styles_exchanged_for"


def put_over(module: nn.Module, behaviour: type) -> None:
    """Give `module` a class that derives from `behaviour` first and its own class second."""
    if not isinstance(module, behaviour):
        module.__class__ = _combined(type(module), behaviour, over=True)


def put_under(module: nn.Module, behaviour: type) -> None:
    """Give `module` a class whose `super().forward` calls reach `behaviour` before the torch layer it derives from."""
    if not isinstance(module, behaviour):
        module.__class__ = _combined(type(module), behaviour, over=False)


def restore_classes(module: M) -> M:
    """Give every module under `module` the class it had before this package exchanged it.

    Exchanged are the classes of layers given to `use_tp_linear`, and, by the styles, those of the linears, embeddings,
    norms and peft wrappers that they shard, and of dropout. Each new class derives from the old one and
    bears its name, so `isinstance` holds all the while; names, parameters, hooks and attributes are the same before
    and after. Only `type(module)` differs.

    A layer whose parameters are sharded needs the exchanged class to run: gather them first. Classes that you set
    yourself (`linear.__class__ = TPLinear`), and those that FSDP2 put over ours, are left alone.

    Returns:
        `module` itself. Issues no collective.
    """
    for child in module.modules():
        while _FROM in vars(type(child)):
            child.__class__ = vars(type(child))[_FROM]
    return module


@cache
def _combined(cls: type, behaviour: type, over: bool) -> type:
    bases = (behaviour, cls) if over else ((behaviour,) if issubclass(behaviour, cls) else (cls, behaviour))
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    if over and "forward" in vars(behaviour):
        names["forward"] = _as_if_of(cls, behaviour)
    return type(cls.__name__, bases, {**names, _FROM: cls, _HOW: (behaviour, over), "__reduce_ex__": _reduce})


def _as_if_of(cls: Any, behaviour: Any) -> Any:
    """The behaviour's forward with the signature of the module's own, for whoever looks at that."""
    given = behaviour.forward
    forward = types.FunctionType(
        given.__code__, given.__globals__, given.__name__, given.__defaults__, given.__closure__
    )
    forward.__kwdefaults__ = given.__kwdefaults__
    return functools.update_wrapper(forward, cls.forward)


def _reduce(module: nn.Module, protocol: int) -> tuple:
    """How a module of an exchanged class is pickled and copied: no module holds that class by name."""
    cls, steps = type(module), []
    while _FROM in vars(cls):
        steps.append(vars(cls)[_HOW])
        cls = vars(cls)[_FROM]
    return _new, (cls, steps[::-1]), module.__getstate__() if hasattr(module, "__getstate__") else vars(module)


def _new(cls: type, steps: list[tuple[type, bool]]) -> nn.Module:
    for behaviour, over in steps:
        cls = _combined(cls, behaviour, over)
    return nn.Module.__new__(cls)
