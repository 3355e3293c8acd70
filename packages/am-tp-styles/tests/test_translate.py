from __future__ import annotations

import copy

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from am_tp_styles import ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora, translate_to_lora

STYLES = [
    (ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate(), use_local_output=False), ColwiseParallelLora),
    (RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), RowwiseParallelLora),
    (SequenceParallel(sequence_dim=2, use_local_output=True), SequenceParallelLora),
]


@pytest.mark.parametrize(("style", "lora"), STYLES)
def test_a_translation_is_a_new_style_with_the_same_layouts(style, lora):
    before = copy.copy(style.__dict__)
    translated = translate_to_lora(style)
    assert type(translated) is lora
    assert translated.__dict__ == before
    assert style.__dict__ == before
    assert type(style) is lora.__mro__[1]


@pytest.mark.parametrize("lora", [ColwiseParallelLora, RowwiseParallelLora, SequenceParallelLora])
def test_a_lora_style_is_returned_as_it_is(lora):
    style = lora()
    assert translate_to_lora(style) is style


def test_a_subclass_is_translated_to_a_subclass_of_both_and_only_once():
    class Named(ColwiseParallel):
        pass

    translated = translate_to_lora(Named(output_layouts=Replicate()))
    assert isinstance(translated, ColwiseParallelLora)
    assert isinstance(translated, Named)
    assert translated.output_layouts == (Replicate(),)
    assert translate_to_lora(translated) is translated
    assert type(translate_to_lora(Named())) is type(translated)


def test_a_plan_becomes_a_new_plan_and_the_given_one_is_left_alone():
    prepare = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    plan = {"q": ColwiseParallel(), "o": RowwiseParallel(), "attention": prepare}
    translated = translate_to_lora(plan)
    assert list(translated) == list(plan)
    assert [type(s) for s in translated.values()] == [ColwiseParallelLora, RowwiseParallelLora, PrepareModuleInput]
    assert [type(s) for s in plan.values()] == [ColwiseParallel, RowwiseParallel, PrepareModuleInput]


class _Unknown(ParallelStyle):
    def _apply(self, module, device_mesh):
        return module


class _Neutral(_Unknown):
    lora_neutral = True


def test_a_style_without_translation_is_refused_by_name():
    with pytest.raises(TypeError, match=r"plan is a .*_Unknown"):
        translate_to_lora(_Unknown())
    with pytest.raises(TypeError, match=r"plan\['mlp'\] is a .*_Unknown"):
        translate_to_lora({"mlp": _Unknown()})
    with pytest.raises(TypeError, match=r"builtins\.str"):
        translate_to_lora("colwise")


def test_a_style_that_says_it_is_neutral_passes():
    style = _Neutral()
    assert translate_to_lora(style) is style
