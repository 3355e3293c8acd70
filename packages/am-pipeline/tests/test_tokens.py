"""Losses that sum over tokens: counted on the pipeline, divided over all ranks whose gradients are averaged."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from am_pipeline import pipeline_model, scale_grads_by_tokens
from am_pipeline.step.targets import count_tokens, rows_of, split_target
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import tiny, token_batch


class Answers(NamedTuple):
    weights: torch.Tensor
    labels: torch.Tensor


def summed(logits, labels):
    return nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")


def weighted(logits, target):
    """Of a dict, a tuple or a named tuple that holds weights of sequences and labels."""
    weights, labels = (target["weights"], target["more"]["labels"]) if isinstance(target, dict) else target
    losses = nn.functional.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none")
    return (losses.sum(1) * weights).sum()


def build(model, mesh, **settings):
    return pipeline_model(
        model, mesh, microbatch_size=1, local_batch_size=4, **({"loss_fn": summed, "device": device_type()} | settings)
    )


def run(built, ids, labels):
    return built[0].step(*((ids,) if built[2] else ()), target=labels if built[3] else None)


@pytest.mark.ranks(4, timeout=90)
def test_gradients_are_divided_by_the_labels_of_all_data_replica_and_context_ranks():
    ids, labels = token_batch(8, 12)
    labels[:4, :10] = -100  # one pipeline's answers are short
    labels[1] = -100  # and one of its microbatches has none
    whole = tiny("llama", tied=True)
    summed(whole(ids, use_cache=False).logits, labels).div((labels != -100).sum()).backward()
    # Replicas beside shards, data alone, context ranks as users name them: FSDP2 averages over each.
    for shape, axes, names in (
        ((2, 2, 1), ("pp", "rep", "dp"), {"dp_axis_names": ("rep", "dp")}),
        ((2, 1, 2), ("pp", "rep", "dp"), {"dp_axis_names": ("rep", "dp")}),
        ((2, 1, 2), ("pp", "dp", "cp"), {"dp_axis_names": ("dp",), "cp_axis_name": "cp"}),
    ):
        mesh = init_device_mesh(device_type(), shape, mesh_dim_names=axes)
        rank = dist.get_rank() % 2

        def shard(part, world, moe, axes=axes, **names):
            fully_shard(part, mesh=world[axes[1:]] if "rep" in axes else world["cp"])

        for given in ((), (mesh, axes[1:]))[: 1 + ("cp" in axes)]:
            built = build(tiny("llama", tied=True), mesh, parallelize_fn=shard, **names)
            run(built, ids[4 * rank : 4 * rank + 4], labels[4 * rank : 4 * rank + 4])
            assert built[0].pipeline_tokens == [6, 48][rank]
            with pytest.raises(ValueError, match=r"several ranks along (rep|dp|cp), .*call scale_grads_by_tokens"):
                built[0].target_tokens  # noqa: B018
            total = scale_grads_by_tokens(built[0], *given)
            assert int(total) == 54
            assert_same(gradients(built[1][0]), gradients(whole), 1e-6, f"gradients over {axes}")
    with pytest.raises(ValueError, match="the mesh has no axis 'data'"):
        scale_grads_by_tokens(built[0], mesh, "data")
    with pytest.raises(ValueError, match="the mesh has no axis 'data'"):
        build(tiny("llama"), mesh, dp_axis_names=("data",))


@pytest.mark.ranks(2)
def test_several_steps_are_divided_by_the_labels_of_all_of_them():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",))
    built = build(tiny("llama"), mesh)
    whole = tiny("llama")
    tokens = 0
    for length in (12, 7):
        ids, labels = token_batch(4, length)
        labels[0, 1:] = -100
        summed(whole(ids, use_cache=False).logits, labels).div(37 + 22).backward()
        run(built, ids, labels)
        tokens += built[0].pipeline_tokens
    assert tokens == 37 + 22
    scale_grads_by_tokens(built[0], tokens=tokens)
    assert_same(gradients(built[1][0]), gradients(whole), 1e-6, "gradients")
    before = gradients(built[1][0])
    scale_grads_by_tokens(built[0], tokens=0)
    assert_same(gradients(built[1][0]), before, 0, "gradients of no label")
    with pytest.raises(ValueError, match="tokens must not be negative"):
        scale_grads_by_tokens(built[0], tokens=-1)
    built[0].mesh = None
    with pytest.raises(ValueError, match="need the mesh that has them"):
        scale_grads_by_tokens(built[0], axes="dp")


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.ranks(2)
def test_targets_of_several_tensors_reach_the_loss_in_their_structure(schedule):
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",))
    ids, labels = token_batch(4, 12)
    labels[2, 5:] = -100
    weights = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=torch.float64)
    whole = tiny("llama")
    weighted(whole(ids, use_cache=False).logits, (weights, labels)).backward()
    for target in ({"weights": weights, "more": {"labels": labels}}, (weights, labels), Answers(weights, labels)):
        built = build(tiny("llama"), mesh, loss_fn=weighted, pipeline_parallel_schedule=schedule)
        run(built, ids, target)
        assert built[0].target_tokens == 41
        for part in built[1]:
            assert_same(gradients(part), gradients(whole), 1e-6, f"gradients with a {type(target).__name__}")


def test_targets_are_split_along_their_first_dim_and_counted_by_their_labels():
    labels = torch.tensor([[1, -100], [2, 3]])
    target = {"advantages": torch.arange(2.0), "beta": 0.1, "all": torch.tensor(3.0), "labels": labels, "x": [labels]}
    first, second = split_target(target, 2)
    assert first["labels"].tolist() == [[1, -100]]
    assert second["x"][0].tolist() == [[2, 3]]
    assert second["advantages"].tolist() == [1]
    assert first["beta"] == second["beta"] == 0.1
    assert first["all"] is target["all"]
    assert rows_of(target) == 2
    assert int(count_tokens(target, -100)) == 3
    assert int(count_tokens((torch.ones(2), labels.bool(), labels[:1], labels), -100)) == 1
    assert count_tokens([torch.ones(2)], -100) == 0
    assert int(count_tokens(torch.ones(2, 3), -100)) == 6
    assert isinstance(split_target(Answers(labels, labels), 2)[1], Answers)


@pytest.mark.ranks(2)
def test_a_copy_of_the_whole_model_in_one_process_agrees_with_defaults_alone():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",))
    whole = copy.deepcopy(model := tiny("llama", tied=True))
    ids, labels = token_batch(4, 12)
    summed(whole(ids, use_cache=False).logits, labels).div(labels.numel()).backward()
    built = pipeline_model(model, mesh, microbatch_size=2, local_batch_size=4, loss_fn=summed)
    run(built, ids, labels)
    scale_grads_by_tokens(built[0])
    assert_same(gradients(built[1][0]), gradients(whole), 1e-6, "gradients")
