"""Ranks that hold different weights are refused on every rank, by name: real ones before anything is laid out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen2_moe.modeling_qwen2_moe
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed.tensor import DTensor

from am_moe import build_meshes, parallelize_model
from am_testkit.device import device_type
from am_testkit.models import tiny, token_batch

AXES = {"dp_axis_names": ("dp_replicate", "dp_shard"), "cp_axis_name": "cp", "tp_axis_name": "tp"}
EXPERTS = {"ep_axis_name": "ep", "ep_shard_axis_names": ("ep_shard",)}
LAYOUTS = {
    "shards": ("qwen3", {"dp_shard": 4}),
    "replicas": ("qwen3", {"dp_replicate": 2, "dp_shard": 2}),
    "context": ("qwen3", {"dp_shard": 2, "cp": 2}),
    "tensor": ("qwen3", {"tp": 2, "dp_shard": 2}),
    "experts": ("qwen2_moe", {"dp_shard": 4, "ep": 2}),
    "experts over tensor ranks": ("qwen2_moe", {"dp_replicate": 2, "tp": 2, "ep": 4}),
}


def lay_out(model, degrees):
    if "tp" in degrees:
        pytest.importorskip("am_tp_plans")
    world, moe = build_meshes(device_type(), **degrees)
    parallelize_model(model, world, moe, **AXES, **(EXPERTS if "ep" in degrees else {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.ranks(4, timeout=90)
def test_other_seeds_are_refused_before_the_model_is_laid_out(layout):
    family, degrees = LAYOUTS[layout]
    model = tiny(family, layers=1, seed=int(dist.get_rank() == 3))
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"hold different weights of this model \(.* and \d+ more\): set one seed"):
        lay_out(model, degrees)
    after = dict(model.named_parameters())
    assert all(after[name] is same and torch.equal(same, values) for name, (same, values) in before.items())


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("shards", "context", "experts")])
@pytest.mark.ranks(4, timeout=90)
def test_weights_given_to_a_model_from_meta_are_compared_at_its_first_forward(layout):
    family, degrees = LAYOUTS[layout]
    for differs in (False, True):
        with torch.device("meta"):
            model = tiny(family, layers=1)
        lay_out(model, degrees)
        model.to_empty(device=device_type())
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(0.02)
            if differs and dist.get_rank() == 3:
                model.model.norm.weight.to_local()[0] += 1
        ids, _ = token_batch(2, 4)
        if differs:
            with pytest.raises(ValueError, match=r"hold different weights of this model \(model\.norm\.weight\)"):
                model(ids, use_cache=False)
        else:
            model(ids, use_cache=False)
            model(ids, use_cache=False)
