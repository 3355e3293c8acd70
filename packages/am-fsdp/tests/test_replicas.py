"""Data ranks that hold different weights are refused on every rank, by name, before anything is sharded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from am_fsdp import check_replicas, fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.models import tiny, token_batch


def lay_out(model, shape):
    names = ("replicas", "shards", "tensor")[: len(shape)]
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=names)
    data = ("replicas", "shards")
    fsdp2_strategy_parallelize(model, mesh, torch.float64, dp_mesh_name=data, tp_mesh_name="tensor")
    return mesh[data]


@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 2)])
@pytest.mark.ranks(4, timeout=90)
def test_ranks_with_other_weights_are_refused_before_and_after_they_are_sharded(shape):
    model = tiny("qwen3", tied=True, seed=int(dist.get_rank() == 0))
    with pytest.raises(ValueError, match=r"hold different weights of this model \(.* and \d+ more\): set one seed"):
        lay_out(model, shape)
    assert not any(isinstance(p, DTensor) for p in model.parameters()), "the model is as it was"
    model = tiny("qwen3", tied=True)
    data = lay_out(model, shape)
    check_replicas(model, data)
    if dist.get_rank() == 0:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.to_local()[0, 0] += 1e-9
    with pytest.raises(ValueError, match=r"of this model \(model\.layers\.1\.mlp\.down_proj\.weight\)"):
        check_replicas(model, data)


@pytest.mark.ranks(2)
def test_shards_of_other_models_are_refused_and_meta_has_nothing_to_compare():
    with pytest.raises(ValueError, match="hold different weights"):
        lay_out(tiny("qwen3", seed=dist.get_rank()), (1, 2))
    with torch.device("meta"):
        model = tiny("qwen3")
    check_replicas(model, lay_out(model, (1, 2)))


@pytest.mark.ranks(2)
def test_tensor_ranks_with_other_weights_are_refused():
    model = tiny("qwen3", seed=dist.get_rank())
    with pytest.raises(ValueError, match="hold different weights"):
        lay_out(model, (1, 1, 2))
    assert not any(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2)], ids=["replicas", "tensor ranks"])
@pytest.mark.ranks(2)
def test_weights_given_to_a_model_from_meta_are_compared_at_its_first_forward(shape):
    for differs in (False, True):
        with torch.device("meta"):
            model = tiny("qwen3")
        lay_out(model, shape)
        model.to_empty(device=device_type())
        torch.manual_seed(0)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).normal_(std=0.02)
            if differs and dist.get_rank() == 1:
                model.model.norm.weight.to_local()[0] += 1
        ids, _ = token_batch(2, 4)
        if differs:
            with pytest.raises(ValueError, match=r"hold different weights of this model \(model\.norm\.weight\)"):
                model(ids, use_cache=False)
        else:
            model(ids, use_cache=False)
            model(ids, use_cache=False)
