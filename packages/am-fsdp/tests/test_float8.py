"""torchao's float8 linears, sharded: they train as on one process, as far as their scales are equal."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from am_fsdp import fsdp2_strategy_parallelize
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    float8 = pytest.importorskip("torchao.float8")


def in_float8(model, gathers=False):
    settings = float8.Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=gathers)
    float8.convert_to_float8_training(
        model, config=settings, module_filter_fn=lambda _, name: name != "lm_head" and "_proj" in name
    )
    return model


# Each tensor's largest number gives its scale. A rank of a data axis has other tokens than the whole batch, and one of
# a tensor axis a part of the weight: they round otherwise than one process does. float8 itself is off by a tenth.
@pytest.mark.parametrize(
    ("shape", "settings", "tolerance"),
    [
        ((2, 1), {}, 1e-6),
        ((2, 1), {"gathers": True, "compiled": True}, 1e-6),
        ((1, 2), {"sequence_parallel": True, "compiled": True}, 2e-2),
    ],
)
@pytest.mark.ranks(2, timeout=120)
def test_float8_linears_train_as_on_one_process(shape, settings, tolerance):
    plain = tiny("llama", layers=1, dtype=torch.float32)
    one, model = in_float8(copy.deepcopy(plain)), in_float8(copy.deepcopy(plain), settings.get("gathers", False))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
    sequence = settings.get("sequence_parallel", False)
    fsdp2_strategy_parallelize(model, mesh, mp_policy=MixedPrecisionPolicy(), sequence_parallel=sequence)
    for layer in model.model.layers if settings.get("compiled") else ():
        layer.compile(backend="aot_eager")
    ids, labels = token_batch(2, 16)  # the same on every rank
    for each in (plain, one, model):
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(one), tolerance, "gradients")
    with pytest.raises(AssertionError):
        assert_same(gradients(one), gradients(plain), 2 * tolerance, "float8 is float8")
