"""A model sharded by styles, with adapters or without, trains as one process trains, under real conditions.

Conditions of `am_testkit.conditions`, crossed pairwise; with `AM_SWEEP` more of each. Every second program starts with
a deep copy, which must compute with its own weights.
"""

from __future__ import annotations

import pytest
import transformers.models.llama.modeling_llama  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from am_testkit.compared import OnRanks, clip_whole_gradients
from am_testkit.conditioned import build_model
from am_testkit.device import device_type
from am_testkit.drawn import assert_trains_like_one_process, draw
from am_tp_styles import translate_to_lora

USUAL = {
    "attention": ("sdpa", "eager"),
    "numbers": ("float64", "float32 under autocast to bfloat16", "bfloat16 with norm and head in float32"),
    "calls": ("three steps", "another length", "forward before clipping", "error survived"),
    "labels": ("all", "uneven"),
    "batch": ("ids", "left padding", "packed", "mask of four dims"),
    "head": ("next token", "token", "inner states", "last logits"),
    "trained": ("all", "frozen at first", "adapters"),
    "recompute": ("none", "layers"),
    "tp": (2,),
}
CASES = draw(USUAL, narrow=("numbers", "head", "weights", "recompute", "copies"), copied=True)


@pytest.mark.parametrize("case", CASES)
def test_styles_train_like_one_process_under_every_condition(case):
    assert_trains_like_one_process(case, laid_out(case))


def laid_out(case):
    model = build_model(case)
    if case["recompute"] == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    plan |= {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {f"model.layers.*.{name}_proj": RowwiseParallel() for name in ("self_attn.o", "mlp.down")}
    if hasattr(model, "lm_head"):
        plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, init_device_mesh(device_type(), (2,)), translate_to_lora(plan))
    if case["compile"] == "layers":
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    return OnRanks(case, model, lambda batch: batch, clip_whole_gradients, 1)
