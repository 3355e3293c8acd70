"""Which plan belongs to which model class, by qualified name: no model class is imported to recognise it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_plans.sources.families.gemma3 import _parallelize_gemma3
from am_tp_plans.sources.families.llama import _parallelize_llama
from am_tp_plans.sources.families.ministral3 import _parallelize_ministral3
from am_tp_plans.sources.families.phi3 import _parallelize_phi3
from am_tp_plans.sources.families.qwen import _parallelize_qwen, _parallelize_qwen_classification
from am_tp_plans.sources.families.qwen3_moe import _parallelize_qwen3_moe

PlanFunction = Callable[..., dict[str, ParallelStyle]]


class PlanRegistry(MutableMapping[str, PlanFunction]):
    """Plan functions by qualified class name, to add to, copy, update and remove from like a dict.

    A class works as a key too: looked up by its own name, then its bases'; added and removed by its own name.
    """

    def __init__(self, functions: Mapping[str | type, PlanFunction]) -> None:
        self._functions: dict[str, PlanFunction] = {}
        self.update(functions)  # type: ignore[arg-type]

    def copy(self) -> PlanRegistry:
        """A registry of its own with the same functions."""
        return PlanRegistry(self._functions)  # type: ignore[arg-type]

    def __getitem__(self, key: str | type) -> PlanFunction:
        if isinstance(key, str):
            return self._functions[key]
        for cls in key.__mro__:
            function = self._functions.get(_name(cls))
            if function is not None:
                return function
        raise KeyError(key)

    def __setitem__(self, key: str | type, function: PlanFunction) -> None:
        if not callable(function):
            raise TypeError(f"{_name(key)} wants a function of (model, sequence_parallel), got {function!r}")
        self._functions[_name(key)] = function

    def __delitem__(self, key: str | type) -> None:
        del self._functions[_name(key)]

    def __contains__(self, key: object) -> bool:
        try:
            self[key]  # type: ignore[index]
        except (KeyError, AttributeError, TypeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)


def is_family(model: nn.Module) -> bool:
    """Whether a model is of exactly one of the classes that have a plan written for them here, still in use."""
    return _name(type(model)) in PARALLELIZE_FUNCTIONS and family_function(model) is not None


def family_function(model: nn.Module) -> PlanFunction | None:
    """The plan function that is looked up for a model's class, if it is one of those written here."""
    function = PARALLELIZE_FUNCTIONS.get(type(model))
    return function if function is not None and function.__module__.startswith(f"{__package__}.families.") else None


def _name(key: str | type) -> str:
    if not isinstance(key, (str, type)):
        raise TypeError(f"a plan function belongs to a class or its qualified name, got {key!r}")
    return key if isinstance(key, str) else f"{key.__module__}.{key.__qualname__}"


PARALLELIZE_FUNCTIONS = PlanRegistry(
    {
        "transformers.models.gemma3.modeling_gemma3.Gemma3ForCausalLM": _parallelize_gemma3,
        "transformers.models.gemma3.modeling_gemma3.Gemma3ForConditionalGeneration": _parallelize_gemma3,
        "transformers.models.llama.modeling_llama.LlamaForCausalLM": _parallelize_llama,
        "transformers.models.ministral3.modeling_ministral3.Ministral3ForCausalLM": _parallelize_ministral3,
        "transformers.models.phi3.modeling_phi3.Phi3ForCausalLM": _parallelize_phi3,
        "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM": _parallelize_qwen,
        "transformers.models.qwen3.modeling_qwen3.Qwen3ForCausalLM": _parallelize_qwen,
        "transformers.models.qwen3.modeling_qwen3.Qwen3ForSequenceClassification": _parallelize_qwen_classification,
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeForCausalLM": _parallelize_qwen3_moe,
    }
)
