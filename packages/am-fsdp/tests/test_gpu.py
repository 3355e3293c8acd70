"""What only a GPU can show; `nox -s gpu` runs it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import fsdp2_strategy_parallelize, nvfsdp_strategy_parallelize
from am_testkit.exact import assert_same
from am_testkit.models import next_token_loss, tiny, token_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
AXES = ("data_parallel", "tensor_parallel")


def optimizer_of(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01)


def logits_of_three_steps(model, optimizer, ids, labels):
    seen = []
    for _ in range(3):
        logits = model(ids, use_cache=False).logits
        seen.append(logits.detach().clone())
        next_token_loss(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(seen)


@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
@pytest.mark.ranks(1, timeout=300)
def test_nvfsdp_trains_as_fsdp2_does(strategy):
    torch.backends.cuda.matmul.allow_tf32 = False
    ours = tiny("llama").float().cuda()
    theirs, whole = copy.deepcopy(ours), copy.deepcopy(ours)
    mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=AXES)
    ids, labels = (t.cuda() for t in token_batch(4, 8, vocab_size=60))
    expected = logits_of_three_steps(whole, optimizer_of(whole), ids, labels)

    fsdp2_strategy_parallelize(theirs, mesh, torch.float32)
    assert_same(logits_of_three_steps(theirs, optimizer_of(theirs), ids, labels), expected, 1e-5, "FSDP2")

    sharded, optimizer = nvfsdp_strategy_parallelize(
        ours,
        mesh,
        optimizer_of(ours),
        nvfsdp_unit_modules=["LlamaDecoderLayer"],
        data_parallel_sharding_strategy=strategy,
        preserve_fp32_weights=True,
        grad_reduce_in_fp32=True,
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert_same(logits_of_three_steps(sharded, optimizer, ids, labels), expected, 1e-5, "nvFSDP")
