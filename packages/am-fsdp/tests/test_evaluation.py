"""Forwards without a backward: the model has the parameters that the optimizer holds, or says that it has not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from am_fsdp import clip_grad_norm_, fsdp2_strategy_parallelize, unshard_fsdp2_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

AXES = ("data_parallel", "tensor_parallel")


def laid_out(shape=(2, 1), dtype=torch.float64, **settings):
    model = tiny("qwen3", dtype=dtype)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=AXES)
    return fsdp2_strategy_parallelize(model, mesh, torch.float64, **settings), whole


def loss_of(model, seed=0):
    ids, labels = token_batch(4, 8, seed=seed)
    return next_token_loss(model(ids, use_cache=False).logits, labels)


def no_grad_loss(model):
    with torch.no_grad():
        loss_of(model, seed=9)


def inference_loss(model):
    with torch.inference_mode():
        loss_of(model, seed=9)


def backbone_alone(model):
    ids, _ = token_batch(4, 8)
    with torch.no_grad():
        model.model(ids, use_cache=False)


def frozen_with_gradients_on(model):
    wanted = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    loss_of(model, seed=9)
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(value)


FORWARDS = [no_grad_loss, inference_loss, backbone_alone, frozen_with_gradients_on]


def is_sharded(model):
    return all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("evaluate", FORWARDS)
@pytest.mark.parametrize(("shape", "recompute"), [((2, 1), False), ((1, 2), False), ((2, 1), True)])
@pytest.mark.ranks(2)
def test_an_evaluation_anywhere_in_a_step_changes_nothing(shape, recompute, evaluate):
    model, whole = laid_out(shape, activation_checkpointing=recompute)
    loss_of(model, seed=5)  # the first forward of FSDP2 goes through the root
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    evaluate(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (model, whole)]
    for step in range(2):
        loss, expected = loss_of(model, seed=step), loss_of(whole, seed=step)
        if evaluate is no_grad_loss:
            evaluate(model)  # between a forward and its backward, too
        loss.backward()
        expected.backward()
        evaluate(model)
        assert_same(gradients(model), gradients(whole), 1e-10, f"gradients of step {step}")
        norm = clip_grad_norm_(model.named_parameters(), 0.1)
        assert_same(norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1), 1e-6, "norm")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        evaluate(model)
    assert_same(dict(model.named_parameters()), dict(whole.named_parameters()), 1e-9, "weights")


@pytest.mark.ranks(2)
def test_the_first_forward_of_all_may_be_in_inference_mode():
    model, whole = laid_out()
    inference_loss(model)
    assert is_sharded(model)
    loss_of(model).backward()
    loss_of(whole).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_parameters_may_be_frozen_and_edited_after_an_evaluation():
    model, whole = laid_out()
    no_grad_loss(model)
    for one in (model, whole):
        one.model.norm.weight.requires_grad_(False)
        with torch.no_grad():
            one.lm_head.weight.mul_(0.5)
    no_grad_loss(model)
    loss, expected = loss_of(model), loss_of(whole)
    assert_same(loss, expected, 1e-10, "loss")
    loss.backward()
    expected.backward()
    assert model.model.norm.weight.grad is None
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_a_metric_that_records_a_graph_is_refused_when_clipping_and_its_stale_copies_are_not_used():
    model, whole = laid_out()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for one in (model, whole):
        loss_of(one).backward()
    loss_of(model, seed=9)
    with pytest.raises(
        ValueError, match=r"holds model\.embed_tokens.weight, .* gathered since a forward that had no backward"
    ):
        clip_grad_norm_(model.named_parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert_same(loss_of(model, seed=1), loss_of(whole, seed=1), 1e-10, "loss after the step")
    assert is_sharded(model)


@pytest.mark.parametrize("change", ["frozen", "written"])
@pytest.mark.ranks(2)
def test_changes_to_gathered_parameters_are_refused_by_the_next_forward(change):
    model, _ = laid_out()
    loss_of(model)
    if change == "frozen":
        model.lm_head.weight.requires_grad_(False)
    else:
        with torch.no_grad():
            model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match=r"weight of the unit .*: (requires_grad was set|it was written) .* gathered"):
        loss_of(model)


@pytest.mark.ranks(2)
def test_what_is_gathered_on_purpose_stays_so_and_edits_of_it_are_refused():
    model, whole = laid_out()
    with unshard_fsdp2_model(model), torch.no_grad():
        for _ in range(2):
            loss_of(model)
            assert not any(isinstance(p, DTensor) for p in model.parameters()), "gathered once for all forwards"
    assert is_sharded(model)
    loss_of(model)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor), "layers are freed after a forward again"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    with (
        pytest.raises(ValueError, match=r"weight was written while it was gathered"),
        unshard_fsdp2_model(model),
        torch.no_grad(),
    ):
        model.lm_head.weight.zero_()
    assert is_sharded(model)
    assert_same(loss_of(model), loss_of(whole), 1e-10, "loss")


@pytest.mark.ranks(2)
def test_what_was_first_gathered_in_inference_mode_trains():
    model, whole = laid_out()
    with torch.inference_mode(), unshard_fsdp2_model(model):
        loss_of(model)
    assert is_sharded(model)
    loss_of(model).backward()
    loss_of(whole).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_plain_fsdp2_is_refused_when_clipping_too():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh(device_type(), (2,)), reshard_after_forward=False)
    model(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        model(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"holds parameter 0, .* gathered"):
        clip_grad_norm_(model.parameters(), 1.0)
    for module in model:
        module.reshard()
    clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.ranks(2, timeout=180)
def test_evaluations_under_torch_compile_give_the_shards_back():
    for how in ("whole", "layers"):
        model, whole = laid_out()
        if how == "layers":
            for layer in model.model.layers:
                layer.compile(backend="eager")
        run = torch.compile(model, backend="eager") if how == "whole" else model
        for step in range(2):
            loss, expected = loss_of(run, seed=step), loss_of(whole, seed=step)
            loss.backward()
            expected.backward()
            no_grad_loss(run)
            assert is_sharded(model)
            assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_the_norm_of_a_rank_without_gradients_is_that_of_all():
    parameter = torch.nn.Parameter(torch.zeros(3))
    if dist.get_rank():
        parameter.grad = torch.ones(3)
    for given in ([parameter] if dist.get_rank() else [], [parameter]):
        assert clip_grad_norm_(given, 10.0, pipeline_shards=2).item() == pytest.approx(3**0.5)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
@pytest.mark.ranks(2)
def test_a_unit_that_was_frozen_at_first_has_the_gradients_of_one_that_never_was(shape):
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for frozen in (False, True):
        model, _ = laid_out(shape, mp_policy=mixed, dtype=torch.float32)
        model.model.embed_tokens.requires_grad_(not frozen)
        loss_of(model).backward()
        model.requires_grad_(True)
        model.zero_grad()
        loss_of(model).backward()
        found.append(gradients(model))
    assert_same(found[1], found[0], 0.0, "gradients")
