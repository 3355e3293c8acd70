"""Inputs of a step as users have them: masks, positions, padding, images; given on every rank or on the first alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_pipeline import pipeline_model, scale_grads_by_divisor
from am_pipeline.step.inputs import split_inputs
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small, small_config


def build(model, *, schedule="1F1B", batch=4, microbatch=2, loss_fn=next_token_loss, scale_grads=True, **settings):
    return pipeline_model(
        model,
        init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",)),
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=microbatch,
        local_batch_size=batch,
        device=torch.device(device_type()),
        loss_fn=loss_fn,
        scale_grads=scale_grads,
        **settings,
    )


def check(model, whole, ids, labels, kwargs, everywhere, schedule="1F1B", batch_dims=None):
    """One step with keyword inputs against one process that runs the same microbatches."""
    dims = {name: 0 for name, value in kwargs.items() if isinstance(value, torch.Tensor)} | (batch_dims or {})
    pieces = split_inputs((ids, labels), kwargs, 2, 4, dims)
    outputs = [whole(piece, use_cache=False, **more).logits for (piece, _), more in zip(*pieces, strict=True)]
    losses = [next_token_loss(o, target) for o, (_, target) in zip(outputs, pieces[0], strict=True)]
    (sum(losses) / 2).backward()
    schedule, parts, first, last, _ = build(model, schedule=schedule)
    given = kwargs if everywhere or first else {}
    logits = schedule.step(*((ids,) if first else ()), target=labels if last else None, **given)
    if last:
        assert_same(logits, torch.cat(outputs), 1e-12, "logits")
    expected = {name: p.grad for name, p in whole.named_parameters(remove_duplicate=False) if p.grad is not None}
    for part in parts:
        mine = part.named_parameters(remove_duplicate=False)
        assert_same({name: p.grad for name, p in mine if name in expected}, expected, 1e-10, "gradients")


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.ranks(2)
def test_a_mask_and_positions_reach_every_stage(everywhere, schedule):
    model = tiny("llama")
    ids, labels = token_batch(4, 12)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    mask[3, 10:] = 0
    positions = torch.arange(12).repeat(4, 1) + torch.arange(4)[:, None]
    kwargs = {"attention_mask": mask, "position_ids": positions}
    check(model, copy.deepcopy(model), ids, labels, kwargs, everywhere, schedule)


@pytest.mark.ranks(2)
def test_the_batch_dim_is_what_the_model_makes_it_where_all_sizes_are_the_same():
    model = tiny("llama", attention="sdpa")
    ids, labels = token_batch(4, 4)
    rows = torch.arange(4)[:, None] + torch.arange(4)
    padded = torch.ones(4, 4, dtype=torch.int64)
    padded[1, 2:] = 0
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    other = causal.repeat(4, 1, 1, 1)
    other[2, 0, 3, 1] = False
    for name, inputs, dims in (
        ("positions of one row", {"position_ids": torch.arange(4)[None] * 2}, {"position_ids": None}),
        ("positions of every row", {"position_ids": rows}, {}),
        ("padding", {"attention_mask": padded}, {}),
        ("one mask for all", {"attention_mask": causal[None, None]}, {"attention_mask": None}),
        ("a mask for each", {"attention_mask": other}, {}),
        ("both", {"attention_mask": padded, "position_ids": torch.arange(4)[None]}, {"position_ids": None}),
        ("none of them", {"attention_mask": None}, {}),
        ("padding in one microbatch alone", {"attention_mask": [None, padded[:2]]}, {}),
    ):
        try:
            check(copy.deepcopy(model), copy.deepcopy(model), ids, labels, inputs, False, batch_dims=dims)
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.ranks(2)
def test_an_input_that_would_run_either_way_is_asked_for_on_every_rank():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(96, 32), nn.Linear(32, 96)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(4))

        def forward(self, input_ids, weights):
            hidden = self.embed(input_ids) * (1 + weights.mean())
            for layer in self.layers:
                hidden = layer(hidden)
            return self.head(hidden)

    torch.manual_seed(0)
    model = Weighted().double()
    example = {"input_ids": torch.ones(2, 12, dtype=torch.int64), "weights": torch.ones(2, dtype=torch.float64)}
    ids, labels = token_batch(4, 12)
    weights = torch.arange(4, dtype=torch.float64)
    schedule, _, first, last, _ = build(copy.deepcopy(model), example_inputs=example)
    with pytest.raises(
        ValueError, match=r"'weights' of shape \(4,\) could be split along dim 0 or no dim: .* batch_dims="
    ):
        schedule.step(*((ids,) if first else ()), target=labels if last else None, weights=weights)
    for dim, pieces in ((0, weights.chunk(2)), (None, [weights] * 2)):
        whole = copy.deepcopy(model)
        outputs = [whole(chunk, piece) for chunk, piece in zip(ids.chunk(2), pieces, strict=True)]
        schedule, _, first, last, _ = build(copy.deepcopy(model), example_inputs=example, batch_dims={"weights": dim})
        logits = schedule.step(*((ids,) if first else ()), target=labels if last else None, weights=weights)
        if last:
            assert_same(logits, torch.cat(outputs), 1e-12, "logits")


@pytest.mark.ranks(2)
def test_packed_sequences_are_told_apart_by_their_positions():
    model = tiny("llama", attention="sdpa")
    ids, labels = token_batch(4, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(4, 12).contiguous()
    whole = copy.deepcopy(model)
    packed = whole(ids, position_ids=positions, use_cache=False).logits
    assert (packed - whole(ids, use_cache=False).logits).abs().max() > 1e-3, "the positions must matter"
    check(model, whole, ids, labels, {"position_ids": positions}, False)


@pytest.mark.ranks(2)
def test_a_list_gives_each_microbatch_its_own():
    model = tiny("llama")
    ids, labels = token_batch(4, 12)
    masks = [torch.ones(2, 12, dtype=torch.int64) for _ in range(2)]
    masks[1][:, 8:] = 0
    check(model, copy.deepcopy(model), ids, labels, {"attention_mask": masks}, False)


@pytest.mark.ranks(2)
def test_images_go_through_the_encoder_of_the_first_stage():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "projection_dim": 32}
    config = small_config("gemma3", vision_config=sizes)
    config.mm_tokens_per_image, config.image_token_index = 4, 61
    config.image_token_id = 61
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    ids, labels = token_batch(4, 12, vocab_size=60)
    ids[:, 2:6] = 61
    kwargs = {
        "pixel_values": torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
        "token_type_ids": (ids == 61).long(),
    }
    check(model, copy.deepcopy(model), ids, labels, kwargs, False)


@pytest.mark.ranks(2)
def test_stages_whose_first_parameters_have_another_dtype_agree_on_the_hidden_state():
    model = tiny("llama")
    model.model.layers[2].self_attn.q_proj.register_forward_pre_hook(lambda m, args: args[0].float())
    model.model.layers[2].self_attn.q_proj.register_forward_hook(lambda m, args, out: out.double())
    model.model.layers[2].self_attn.q_proj.float()  # the first parameter of the second stage
    ids, labels = token_batch(4, 16)
    check(model, copy.deepcopy(model), ids, labels, {}, False)


@pytest.mark.ranks(2)
def test_a_head_in_another_dtype_than_the_layers_leaves_the_hidden_state_alone():
    model = tiny("llama", layers=2, vocab_size=2048)
    model.lm_head.float()  # more parameters than the layer of its stage has
    model.lm_head.register_forward_pre_hook(lambda m, args: args[0].float())
    model.lm_head.register_forward_hook(lambda m, args, out: out.double())
    ids, labels = token_batch(4, 16)
    check(model, copy.deepcopy(model), ids, labels, {}, False)


@pytest.mark.ranks(2)
def test_layers_in_different_dtypes_are_refused_on_every_rank():
    model = tiny("llama", layers=2)
    model.model.layers[1].float()
    ids, labels = token_batch(4, 16)
    schedule, _, first, last, _ = build(model)
    with pytest.raises(ValueError, match=r"some stages have layers in torch\.float32 and others in torch\.float64"):
        schedule.step(*((ids,) if first else ()), target=labels if last else None)


@pytest.mark.ranks(2)
def test_a_model_whose_layers_take_the_ids_gets_them_on_every_stage():
    model = small("deepseek_v4")
    ids, labels = token_batch(4, 16)
    check(model, small("deepseek_v4"), ids, labels, {}, False, "Interleaved1F1B")


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble", "InterleavedZeroBubble"])
@pytest.mark.ranks(2)
def test_what_travels_beside_the_hidden_state_has_its_gradients_in_every_schedule(schedule):
    model, whole = small("zamba2"), small("zamba2")
    ids, labels = token_batch(8, 16)
    chunks = list(zip(ids.chunk(4), labels.chunk(4), strict=True))
    (sum(next_token_loss(whole(i, use_cache=False).logits, t) for i, t in chunks) / 4).backward()
    schedule, parts, first, last, _ = build(model, schedule=schedule, batch=8)
    schedule.step(*((ids,) if first else ()), target=labels if last else None)
    for part in parts:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_an_input_that_cannot_be_shared_is_refused_on_every_rank():
    schedule, _, first, last, _ = build(tiny("llama"))
    ids, labels = token_batch(4, 12)
    with pytest.raises(TypeError, match="the input 'mask' is a dict"):
        schedule.step(*((ids,) if first else ()), target=labels if last else None, **({"mask": {}} if first else {}))


@pytest.mark.ranks(2)
def test_a_loss_over_unevenly_padded_microbatches_is_normalised_by_their_tokens():
    def summed(logits, labels):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    model = tiny("llama", tied=True)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(4, 12)
    labels[0, 3:] = -100
    labels[1] = -100
    expected = nn.functional.cross_entropy(whole(ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
    expected.backward()
    schedule, parts, first, last, stages = build(model, loss_fn=summed, scale_grads=False)
    losses: list = []
    schedule.step(*((ids,) if first else ()), target=labels if last else None, losses=losses)
    assert schedule.target_tokens == 27, "known on every rank"
    scale_grads_by_divisor(stages, schedule.target_tokens)
    if last:
        assert_same(torch.stack(losses).sum() / schedule.target_tokens, expected, 1e-6, "loss")
    assert_same(gradients(parts[0]), gradients(whole), 1e-6, "gradients")


@pytest.mark.ranks(2)
def test_a_target_of_another_batch_is_refused_on_every_rank():
    schedule, _, first, last, _ = build(tiny("llama"))
    ids, labels = token_batch(4, 12)
    with pytest.raises(ValueError, match="the target has 3 rows, but the batch has 4 sequences"):
        schedule.step(*((ids,) if first else ()), target=labels[:3] if last else None)


def test_tensors_are_split_along_their_batch_dim():
    batch = {
        "attention_mask": torch.arange(8).view(4, 2),
        "position_ids": torch.arange(24).view(3, 4, 2),
        "shared": torch.zeros(1, 2),
        "flag": True,
        "packed": [torch.zeros(3), torch.zeros(5)],
    }
    args, kwargs = split_inputs(
        (torch.arange(4),), batch, 2, 4, {"attention_mask": 0, "position_ids": 1, "shared": None}
    )
    assert [a[0].tolist() for a in args] == [[0, 1], [2, 3]]
    assert kwargs[1]["attention_mask"].tolist() == [[4, 5], [6, 7]]
    assert kwargs[0]["position_ids"].shape == (3, 2, 2)
    assert kwargs[1]["shared"].shape == (1, 2)
    assert kwargs[1]["flag"] is True
    assert [k["packed"].numel() for k in kwargs] == [3, 5]
