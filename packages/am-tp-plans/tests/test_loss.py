"""Cross entropy of logits sharded over the vocabulary, against torch's of whole ones."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import tiny, token_batch
from am_tp_plans import apply_plan, keep_logits_sharded, resolve_plan, vocab_parallel_cross_entropy


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


def reference(logits, labels, z_loss=0.0, **settings):
    losses = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), **settings)
    counted = (labels != settings.get("ignore_index", -100)).flatten()
    z = z_loss * logits.flatten(0, -2).logsumexp(-1).square() * counted
    kind = settings.get("reduction", "mean")
    return losses + (z.sum() / counted.sum() if kind == "mean" else z.sum() if kind == "sum" else z)


SETTINGS = [
    {},
    {"ignore_index": 7},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 1.0, "z_loss": 0.5, "ignore_index": 3, "reduction": "sum"},
    {"label_smoothing": 0.3, "reduction": "none"},
]


@pytest.mark.parametrize("vocabulary", [24, 23, 3])
@pytest.mark.ranks(4)
def test_losses_and_gradients_equal_torchs_also_for_an_uneven_vocabulary(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2, 6, vocabulary, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocabulary, (2, 6), generator=generator)
    for settings in SETTINGS:
        labels[0, :2] = settings.get("ignore_index", -100)
        whole = logits.clone().requires_grad_()
        shards = distribute_tensor(logits, axis(), [Shard(-1)]).requires_grad_()
        mine, expected = vocab_parallel_cross_entropy(shards, labels, **settings), reference(whole, labels, **settings)
        assert_same(mine.flatten(), expected.flatten(), 1e-12, f"loss with {settings}")
        (mine.square().sum()).backward()
        (expected.square().sum()).backward()
        assert_same(shards.grad, whole.grad, 1e-12, f"gradient with {settings}")
        assert_same(vocab_parallel_cross_entropy(logits, labels, **settings).flatten(), expected.flatten(), 1e-12)
        labels[0, :2] = 1
    replicated = distribute_tensor(logits, axis(), [Replicate()])
    assert_same(vocab_parallel_cross_entropy(replicated, labels), reference(logits, labels), 1e-12)
    assert vocab_parallel_cross_entropy(shards, torch.full((2, 6), -100)).isnan(), "as torch: a mean of nothing"


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere"])
@pytest.mark.ranks(2)
def test_a_model_trains_on_logits_that_stay_sharded(family):
    """Also through its own loss under torch's `loss_parallel`, and where logits are scaled or capped."""
    settings = {"final_logit_softcapping": 5.0} if family == "gemma3_text" else {}
    model = tiny(family, **settings)
    whole, own = copy.deepcopy(model), copy.deepcopy(model)
    ids, labels = token_batch(2, 12)
    labels[:, :3] = -100
    expected = whole(ids, use_cache=False).logits
    reference(expected, labels).backward()
    for each in (model, own):
        apply_plan(each, axis(), keep_logits_sharded(each, resolve_plan(each)))
    logits = model(ids, use_cache=False).logits
    assert isinstance(logits, DTensor)
    assert logits.to_local().shape == (2, 12, 48)
    with CommDebugMode() as comm:
        loss = vocab_parallel_cross_entropy(logits, labels)
    assert comm.get_total_counts() == 2
    loss.backward()
    assert_same(gradients(model), gradients(whole), 1e-6, "gradients")
    whole.zero_grad()
    whole(ids, labels=ids, use_cache=False).loss.backward()
    with loss_parallel():
        own(ids, labels=ids, use_cache=False).loss.backward()
    assert_same(gradients(own), gradients(whole), 2e-5, "gradients of the model's own loss, computed in float32")


@pytest.mark.ranks(2)
def test_bfloat16_logits_are_reduced_in_float32():
    logits = (3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    labels = torch.arange(4)
    shards = distribute_tensor(logits, axis(), [Shard(-1)]).requires_grad_()
    loss = vocab_parallel_cross_entropy(shards, labels)
    loss.backward()
    assert shards.grad.dtype == torch.bfloat16
    assert_same(loss, reference(logits.float(), labels), 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": torch.zeros(2, 5, dtype=torch.int64)}, r"labels \(2, 5\) do not fit logits \(2, 6, 8\)"),
        ({"labels": torch.zeros(2, 6)}, "labels must be int64"),
        ({"labels": torch.full((2, 6), 8)}, r"labels must be in \[0, 8\) or -100, got 8"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5 must be in \[0, 1\]"),
        ({"z_loss": -1.0}, "z_loss=-1.0 not negative"),
        ({"reduction": "max"}, "reduction='max' is not one of mean, sum, none"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    settings = {"logits": torch.randn(2, 6, 8), "labels": torch.zeros(2, 6, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=words):
        vocab_parallel_cross_entropy(**settings)


@pytest.mark.ranks(2)
def test_another_layout_and_a_plan_without_a_sharded_head_are_refused():
    labels = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits must be sharded over the vocabulary of one axis"):
        vocab_parallel_cross_entropy(distribute_tensor(torch.randn(2, 6, 8), axis(), [Shard(1)]), labels)
    model = tiny("llama")
    with pytest.raises(ValueError, match="the plan has no style for lm_head; only colwise"):
        keep_logits_sharded(model, {})
    with pytest.raises(ValueError, match="Linear names no output embedding"):
        keep_logits_sharded(nn.Linear(2, 2), {})
