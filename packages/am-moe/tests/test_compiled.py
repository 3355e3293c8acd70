"""Layers that torch.compile traces train as the model does: what travels keeps its gradients there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.bamba.modeling_bamba
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe import apply_ep
from am_moe.context_parallel import apply_cp, shard_batch, shard_loss, unshard_sequence
from am_moe.context_parallel.heads import _AllToAll
from am_moe.context_parallel.mixers import _Collect, _Gather, _Spread
from am_moe.expert_parallel.dispatchers.all_gather import _Gather as _GatherTokens
from am_moe.expert_parallel.dispatchers.all_gather import _SumOfRanks
from am_moe.expert_parallel.dispatchers.all_to_all import Routes, _Return
from am_moe.expert_parallel.ordering import by_expert
from am_moe.expert_parallel.shared_tokens import share_of, whole_again
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import logits_of, small


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
@pytest.mark.ranks(2, timeout=180)
def test_compiled_layers_with_spread_experts_train_as_in_one_process(dispatcher, dynamic):
    model = tiny("qwen3_moe", layers=1)
    one = copy.deepcopy(model)
    ids, labels = token_batch(4, 8)
    expected = one(ids, use_cache=False).logits
    next_token_loss(expected, labels).backward()
    rank = dist.get_rank()
    apply_ep(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("ep",)), dispatcher=dispatcher)
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=dynamic)
    mine = slice(2 * rank, 2 * rank + 2)
    logits = model(ids[mine], use_cache=False).logits
    next_token_loss(logits, labels[mine]).backward()
    assert_same(logits, expected[mine], 1e-5, "logits")
    actual = gradients(model)
    for name, gradient in actual.items():
        if "experts" not in name:  # whoever does data parallelism averages these
            dist.all_reduce(gradient)
            gradient /= 2
    assert_same(actual, gradients(one), 1e-5, "gradients")


@pytest.mark.parametrize(("family", "kind"), [("llama", "p2p"), ("llama", "a2a"), ("bamba", "p2p")])
@pytest.mark.ranks(2, timeout=180)
def test_compiled_layers_of_a_shared_sequence_train_as_in_one_process(family, kind):
    model = tiny("llama", layers=1) if family == "llama" else small(family, dtype=torch.float64).train()
    one = copy.deepcopy(model)
    ids = token_batch(2, 16, vocab_size=60)[0]
    expected = logits_of(one, ids)
    loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))
    apply_cp(model, mesh, kind)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    shard = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    logits = logits_of(model, shard["input_ids"], position_ids=shard["position_ids"])
    shard_loss(logits, shard).backward()
    assert_same(unshard_sequence(logits, mesh), expected, 1e-5, "logits")
    actual = gradients(model)
    for gradient in actual.values():
        dist.all_reduce(gradient)
        gradient /= 2
    assert_same(actual, gradients(one), 1e-5, "gradients")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.ranks(2, timeout=120)
def test_the_gradient_of_whatever_travels_survives_a_compiler(backend):
    group, mesh = dist.group.WORLD, init_device_mesh(device_type(), (2,))
    ids, routes = (
        torch.zeros(2, 1, dtype=torch.int32),
        Routes(by_expert(torch.zeros(2, 1), 1, None).rows, [1, 1], [1, 1]),
    )
    functions = {
        "heads": lambda x: _AllToAll.apply(x, group),
        "spread": lambda x: _Spread.apply(x, group),
        "collect": lambda x: _Collect.apply(x, group),
        "gather": lambda x: _Gather.apply(x, group),
        "tokens, gathered": lambda x: _GatherTokens.apply(group, x.flatten(1), x[:, 0], ids)[0],
        "tokens, summed": lambda x: _SumOfRanks.apply(group, x),
        "tokens, exchanged": lambda x: _Return.apply(routes, group, x),
        "tokens, shared": lambda x: whole_again(mesh, share_of(mesh, x * 2)[0], 2),
    }
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(dist.get_rank()))
    for name, function in functions.items():
        results = []
        for run in (function, torch.compile(lambda y, function=function: function(y * 1) * 3, backend=backend)):
            mine = x.clone().requires_grad_()
            out = run(mine)
            out = out * 3 if run is function else out
            out.square().sum().backward()
            results.append((out.detach(), mine.grad))
        assert results[0][1].norm() > 0.1, name
        assert_same(*(out for out, _ in results[::-1]), 1e-6, name)
        assert_same(*(gradient for _, gradient in results[::-1]), 1e-6, f"gradient of {name}")
