"""From a parallel style to the same style for layers with LoRA adapters."""

from __future__ import annotations

import copy
from functools import cache

from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from am_tp_styles.lora import ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora

_LORA_STYLES = {
    ColwiseParallel: ColwiseParallelLora,
    RowwiseParallel: RowwiseParallelLora,
    SequenceParallel: SequenceParallelLora,
}
_WITHOUT_PARAMETERS = (PrepareModuleInput, PrepareModuleOutput, PrepareModuleInputOutput)


def translate_to_lora(plan: ParallelStyle | dict[str, ParallelStyle]) -> ParallelStyle | dict[str, ParallelStyle]:
    """The LoRA-capable form of a style, or of every style of a plan; the argument is not changed.

    A style keeps its layouts and options. A subclass of one of torch's styles keeps its own behaviour too: its
    translation derives from both the LoRA style and the subclass. Styles that are LoRA-capable already, and styles that
    touch no parameter of a linear (`PrepareModule*`, and any style whose class says `lora_neutral = True`), are
    returned as they are.

    Args:
        plan: a `ParallelStyle`, or a dict from module name to `ParallelStyle`.

    Returns:
        A style, or a new dict with the same keys in the same order.

    Raises:
        TypeError: a style has no translation, or something is not a style. Issues no collective.
    """
    if isinstance(plan, dict):
        return {name: _translate(style, f"plan[{name!r}]") for name, style in plan.items()}
    return _translate(plan, "plan")


def _translate(style: ParallelStyle, label: str) -> ParallelStyle:
    if isinstance(style, (*_LORA_STYLES.values(), *_WITHOUT_PARAMETERS)) or getattr(style, "lora_neutral", False):
        return style
    if not isinstance(style, tuple(_LORA_STYLES)):
        known = ", ".join(base.__name__ for base in _LORA_STYLES)
        raise TypeError(
            f"{label} is a {type(style).__module__}.{type(style).__qualname__}, which has no LoRA form; translatable "
            f"are {known} and their subclasses. If it touches no linear, set lora_neutral = True on its class"
        )
    translated = copy.copy(style)
    translated.__class__ = _lora_class(type(style))
    return translated


@cache
def _lora_class(cls: type[ParallelStyle]) -> type[ParallelStyle]:
    if cls in _LORA_STYLES:
        return _LORA_STYLES[cls]
    lora = next(lora for base, lora in _LORA_STYLES.items() if issubclass(cls, base))
    return type(f"{cls.__name__}Lora", (lora, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
