"""Plans and the sharded loss on a GPU, over NCCL; `nox -s gpu` runs it, with `-s` it prints the memory of the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_tp_plans import apply_plan, check_gradients, keep_logits_sharded, resolve_plan, vocab_parallel_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


def axis():
    return init_device_mesh(DEVICE, (1,), mesh_dim_names=("tp",))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "phi3"])
@pytest.mark.ranks(1, timeout=300)
def test_a_family_trains_under_its_plan_as_without_one(family, compiled):
    model = tiny(family, layers=2, attention="sdpa").to(DEVICE)
    whole = copy.deepcopy(model)
    ids, labels = (t.to(DEVICE) for t in token_batch(2, 16))
    expected = whole(ids, use_cache=False).logits
    next_token_loss(expected, labels).backward()
    mesh = axis()
    apply_plan(model, mesh, keep_logits_sharded(model, resolve_plan(model, sequence_parallel=True)))
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    logits = model(ids, use_cache=False).logits
    vocab_parallel_cross_entropy(logits, labels).backward()
    check_gradients(model, mesh)
    # A compiled layer computes its norms, rotations and routers in float32 as one kernel, and rounds elsewhere.
    tolerance = 1e-5 if compiled else 1e-6
    assert_same(logits, expected, tolerance, "logits")
    assert_same(gradients(model), gradients(whole), 10 * tolerance, "gradients")


@pytest.mark.ranks(1, timeout=120)
def test_the_loss_of_bfloat16_logits_takes_less_memory_than_torchs_and_is_nearer_to_exact():
    tokens, vocabulary = 8192, 32768
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = 3 * torch.randn(tokens, vocabulary, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    labels = torch.randint(0, vocabulary, (tokens,), device=DEVICE, generator=generator)
    exact = logits.double().requires_grad_()
    expected = nn.functional.cross_entropy(exact, labels)
    expected.backward()
    shards = distribute_tensor(logits, axis(), [Shard(-1)])
    runs = {
        "torch": (logits, lambda x: nn.functional.cross_entropy(x, labels)),
        "torch in float32": (logits, lambda x: nn.functional.cross_entropy(x.float(), labels)),
        "vocab_parallel_cross_entropy": (shards, lambda x: vocab_parallel_cross_entropy(x, labels)),
    }
    errors, peaks = {}, {}
    for name, (given, loss_of) in runs.items():
        x = given.detach().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = loss_of(x)
        loss.backward()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / logits.nbytes
        grad = x.grad if isinstance(x.grad, torch.Tensor) and not hasattr(x.grad, "to_local") else x.grad.to_local()
        errors[name] = ((grad.double() - exact.grad).norm() / exact.grad.norm()).item()
        assert abs(loss.item() - expected.item()) < 1e-2
        del loss, x, grad
    print("\n| loss and its gradient | error of the gradient | memory, of the logits' bytes |\n|---|---|---|")
    for name in runs:
        print(f"| {name} | {errors[name]:.1e} | {peaks[name]:.2f} |")
    ours = "vocab_parallel_cross_entropy"
    assert errors[ours] <= 1.1 * errors["torch in float32"]
    assert peaks[ours] < peaks["torch in float32"]
