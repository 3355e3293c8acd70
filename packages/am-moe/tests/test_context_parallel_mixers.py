"""Linear attention, SSMs and convolutions under context parallelism: exact, padded or not, recomputed or not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.bamba.modeling_bamba
import transformers.models.gemma3.modeling_gemma3
import transformers.models.lfm2_moe.modeling_lfm2_moe
import transformers.models.minimax.modeling_minimax
import transformers.models.qwen3_next.modeling_qwen3_next
import transformers.models.zaya.modeling_zaya  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from am_moe import apply_ac
from am_moe.context_parallel import COMM_TYPES, apply_cp, shard_batch, shard_loss, unshard_sequence
from am_moe.context_parallel.mixers import Running, _Collect, _Gather, _Spread, run_on_whole_sequences
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.zoo import logits_of, small

# Gated delta rules compute in float32 in transformers, whatever the model's dtype; its norms and softmax do too.
TOLERANCE = {"qwen3_next": 1e-4, "zaya": 1e-5}
FAMILIES = ["bamba", "qwen3_next", "minimax", "zaya", "lfm2_moe"]
TOKENS = 16


def compare(family, rows, kind="p2p", padding=None, change=lambda model: None):
    """Logits and gradients of a sharded model against one process; `padding` is a mask `(rows, TOKENS)`."""
    ranks = dist.get_world_size()
    axes = (ranks // 2, 2) if kind == "a2a+p2p" else (ranks,)
    mesh = init_device_mesh(device_type(), axes, mesh_dim_names=("cp_p2p", "cp_a2a")[-len(axes) :])
    one = small(family, dtype=torch.float64, attention="sdpa").train()
    model = copy.deepcopy(one)
    ids = torch.randint(3, 60, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    extra = {}
    if padding is not None:
        batch |= {"attention_mask": padding, "labels": ids.masked_fill(padding == 0, -100)}
        batch["position_ids"] = torch.arange(TOKENS).expand(rows, -1)
        extra = {"attention_mask": padding, "position_ids": batch["position_ids"]}
    expected = logits_of(one, ids, **extra)
    wanted_loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    wanted_loss.backward()
    apply_cp(model, mesh, kind)
    change(model)
    shard = shard_batch(batch, mesh)
    sent = {name: shard[name] for name in ("position_ids", "attention_mask") if name in shard}
    logits = logits_of(model, shard["input_ids"], **sent)
    loss = shard_loss(logits, shard)
    loss.backward()
    wanted = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
    floor = 1e-4 * max(gradient.abs().max().item() for gradient in wanted.values())
    real = slice(None) if padding is None else padding.bool()
    errors = {"logits": relative_error(unshard_sequence(logits, mesh)[real], expected[real], 0.0)}
    for name, parameter in model.named_parameters():
        if name in wanted:
            gradient = averaged(parameter.grad)
            errors[name] = relative_error(gradient, wanted[name], floor)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= TOLERANCE.get(family, 1e-5), f"{family}, {kind}: {worst} is off by {errors[worst]:.1e}"
    return mesh


def averaged(gradient):
    if hasattr(gradient, "full_tensor"):
        return whole(gradient)
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient / dist.get_world_size()


@pytest.mark.parametrize("rows", [4, 3, 1])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.ranks(2)
def test_a_mixer_sees_whole_sequences_whether_rows_divide_or_not(family, rows):
    compare(family, rows)


@pytest.mark.parametrize("kind", COMM_TYPES)
@pytest.mark.ranks(4)
def test_every_type_takes_mixers_on_four_ranks(kind):
    compare("bamba", 4, kind)
    compare("bamba", 2, kind)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.ranks(2)
def test_padding_on_some_ranks_alone_reaches_every_mixer(family, rows):
    padding = torch.ones(rows, TOKENS, dtype=torch.int64)
    padding[0, 6:10] = 0  # the tail of the first chunk and the head of the next: rank 1's tokens alone
    padding[0, 10:] = 0 if family == "minimax" else 1
    compare(family, rows, padding=padding)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.ranks(2)
def test_mixers_are_recomputed_and_sharded(rows):
    def change(model):
        apply_ac(model)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    padding = torch.ones(rows, TOKENS, dtype=torch.int64)
    padding[0, :5] = 0
    compare("qwen3_next", rows, padding=padding, change=change)


@pytest.mark.ranks(2)
def test_a_tower_is_left_alone():
    mesh = compare("gemma3", 2)
    plain = small("gemma3")
    model = apply_cp(copy.deepcopy(plain), mesh)
    size = model.config.vision_config.image_size
    image = torch.linspace(-1, 1, 3 * size * size, dtype=torch.float64).reshape(1, 3, size, size)
    found, expected = (m.model.vision_tower(image).last_hidden_state for m in (model, plain))
    assert found.equal(expected)


@pytest.mark.ranks(2)
def test_each_exchange_is_the_inverse_or_the_transpose_of_another():
    group = dist.group.WORLD
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    x.requires_grad_()
    generator = torch.Generator().manual_seed(9 + dist.get_rank())
    assert _Collect.apply(_Spread.apply(x, group), group).equal(x)
    for exchange in (_Spread, _Collect, _Gather):
        given = x.detach()[:, :2].requires_grad_() if exchange is _Collect else x
        out = exchange.apply(given, group)
        weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        (gradient,) = torch.autograd.grad(out, given, weights)
        # <A x, w> = <x, A' w>, summed over the ranks
        both = torch.stack([(out.detach() * weights).sum(), (given.detach() * gradient).sum()])
        dist.all_reduce(both)
        assert torch.isclose(*both, rtol=1e-12)


@pytest.mark.ranks(2)
def test_what_convolves_inside_attention_or_mixes_in_an_unknown_way_is_refused():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))
    model = small("llama")
    model.model.layers[1].self_attn.shift = nn.Conv1d(4, 4, 3)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.shift \(Conv1d\) is a convolution, .* in attention"):
        apply_cp(model, mesh)
    model = small("bamba")
    mixer = next(layer for layer in model.model.layers if hasattr(layer, "mamba"))
    mixer.mamba.conv1d = nn.Linear(4, 4)  # nothing is left to know it by
    with pytest.raises(ValueError, match="has neither attention that the registry serves nor a known mixer"):
        apply_cp(model, mesh)


@pytest.mark.ranks(2)
def test_a_part_of_a_pipeline_may_hold_mixers_alone():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))
    part = small("qwen3_next")
    part.model.layers = nn.ModuleList(layer for layer in part.model.layers if hasattr(layer, "linear_attn"))
    assert 0 < len(part.model.layers) < 4
    assert apply_cp(part, mesh) is part


class Smoothing(nn.Module):
    """Owns a convolution, and adds its mask."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, hidden_states, attention_mask=None):
        return hidden_states if attention_mask is None else hidden_states + attention_mask[..., None]


@pytest.mark.ranks(2)
def test_a_mask_of_numbers_on_one_rank_is_refused_on_every_rank():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))
    mixer = Smoothing()
    run_on_whole_sequences(mixer, "mixer", mesh, lambda: Running(2, 4, padded=True))
    mask = torch.zeros(2, 4) if dist.get_rank() else None
    with pytest.raises(ValueError, match="mixer is given a padding mask of floating-point numbers"):
        mixer(torch.ones(2, 4, 4), attention_mask=mask)
