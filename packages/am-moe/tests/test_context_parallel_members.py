"""Codes that a reading of the forward once took for exact: each is refused with its place, or exact now."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe.context_parallel import apply_cp, shard_batch, unshard_sequence
from am_testkit.device import device_type
from am_testkit.exact import relative_error
from am_testkit.zoo import small

ROWS, TOKENS = 2, 16
REFUSED = r"context parallelism is not right for LlamaForCausalLM: .*layers\.1"


class Changed(nn.Module):
    """A layer before which a function of this module and the hidden states runs."""

    def __init__(self, layer, change):
        super().__init__()
        self.inner, self.change = layer, change
        self.register_buffer("kept", torch.zeros(4, dtype=torch.float64))
        self.plain = torch.zeros(3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, hidden_states, **kwargs):
        return self.inner(self.change(self, hidden_states), **kwargs)


def changed(change):
    model = small("llama", 2)
    model.model.layers[1] = Changed(model.model.layers[1], change)
    return model


def cp_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("cp",))["cp"]


def ids():
    return torch.randint(3, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def assert_refused(change, match=REFUSED):
    with pytest.raises(ValueError, match=match):
        apply_cp(changed(change), cp_mesh(), example_inputs={"input_ids": ids()})


def assert_exact(change):
    one, mesh = changed(change), cp_mesh()
    model = apply_cp(copy.deepcopy(one), mesh)
    expected = one(input_ids=ids(), use_cache=False).logits
    out = model(**shard_batch({"input_ids": ids()}, mesh)).logits
    assert relative_error(unshard_sequence(out, mesh), expected, 0.0) < 1e-6


def shifted_into(target):
    def change(_, h):
        into = target(h)
        into[:, 1:] = h[:, :-1]
        return h + into

    return change


def written(write, view=lambda y: y, result=lambda y: y):
    """A copy of the hidden states whose view, made before, is read after a write into it."""

    def change(_, h):
        copied = h.clone()
        before = view(copied)
        write(copied, h)
        return result(before)

    return change


def first_row_of_flat(_, h):
    """Ones in one row of what was the same in all: rows and tokens of it are no longer interchangeable."""
    flat = torch.zeros(h.shape[0] * h.shape[1], h.shape[2], dtype=h.dtype)
    flat.view(h.shape)[0] = 1.0
    by_token = h.transpose(0, 1).flatten(0, 1) * flat
    return by_token.view(h.shape[1], h.shape[0], -1).transpose(0, 1)


def kept_in_a_buffer(module, h):
    module.kept[:2] = h.detach().mean((0, 1))[:2]
    return h * module.kept.sum()


def kept_in_a_parameter(module, h):
    with torch.no_grad():
        module.scale[:2] = h.mean((0, 1))[:2]
    return h * (1 + module.scale.sum())


WRITES = {
    "shift into zeros": shifted_into(torch.zeros_like),
    "shift into empty": shifted_into(torch.empty_like),
    "shift into flat zeros": lambda _, h: shifted_into(lambda x: torch.zeros(x.numel()).to(x).view(x.shape))(_, h),
    "shift into a clone": shifted_into(torch.clone),
    "first": written(lambda y, _: y[:, 0].zero_()),
    "narrow": written(lambda y, _: y.narrow(1, 0, 1).zero_()),
    "added": written(lambda y, h: y[:, 1:].add_(h[:, :-1])),
    "step": written(lambda y, _: y[:, ::2].mul_(2)),
    "copy_": written(lambda y, h: y[:, :4].copy_(h[:, 4:8])),
    "masked_fill_": written(lambda y, h: y[:, :1].masked_fill_(h[:, :1] > 0, 0.0)),
    "index_put_": written(lambda y, h: y[:, 1:].index_put_((torch.tensor([0]),), h[:1, :-1])),
    "scatter_": written(lambda y, h: y.scatter_(1, torch.zeros(*h.shape, dtype=torch.int64), h)),
    "index_fill_": written(lambda y, _: y.index_fill_(1, torch.tensor([0]), 0.0)),
    "for each": written(lambda y, _: torch._foreach_mul_([y[:, 0]], 2.0)),
    "out": written(lambda y, h: torch.cumsum(h.detach(), 1, out=y.detach())),
    "out of a slice": written(lambda y, h: torch.mul(h[:, :-1].detach(), 2, out=y.detach()[:, 1:])),
    "as strided": written(lambda y, _: y.as_strided((1, y.shape[2]), (1, 1)).zero_()),
    "diagonal": written(lambda y, _: y.diagonal(0, 0, 1).zero_()),
    "detached": written(lambda y, _: y.detach()[:, 0].zero_()),
    "data": written(lambda y, _: y.data[:, 0].zero_()),
    "chain of views": written(lambda y, _: y.flatten(0, 1).view(y.shape).narrow(1, 0, 2).swapaxes(0, 1)[0].zero_()),
    "view made before": written(lambda y, _: y[:, 0].zero_(), lambda y: y.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "flat view": written(lambda y, h: y.flatten(0, 1)[1:].add_(h.flatten(0, 1)[:-1])),
    "buffer": kept_in_a_buffer,
    "parameter": kept_in_a_parameter,
    "one row of flat tokens": first_row_of_flat,
}  # fmt: skip


@pytest.mark.ranks(2, timeout=120)
def test_writes_into_some_tokens_are_refused_with_their_place():
    for change in WRITES.values():
        assert_refused(change)


@pytest.mark.ranks(2, timeout=120)
def test_writes_that_keep_tokens_apart_are_exact():
    def change(_, h):
        flat = torch.zeros(h.shape[0] * h.shape[1], h.shape[2], dtype=h.dtype)
        flat[:, :4] = h.flatten(0, 1)[:, :4]
        into, seen = torch.empty_like(h), torch.zeros_like(h)
        view = seen.view(-1, h.shape[2])
        into.copy_(h)
        into[..., ::2].mul_(2)
        view[:, 1:] = into.flatten(0, 1)[:, :-1]
        seen.detach()[..., -1:].add_(1.0)
        return h + into + seen + flat.view(h.shape)

    assert_exact(change)


def from_numpy_later(_, h):
    array = np.zeros(1)
    tensor = torch.from_numpy(array)
    h = h + tensor
    array[0] = h.shape[1]
    return h + tensor


def through_numpy(module, h):
    module.plain.numpy()[0] = h.shape[1]
    return h + module.plain.sum()


def into_part_of_a_constant(module, h):
    module.plain[0] = h.numel()
    return h + module.plain.sum()


NUMBERS = {
    "tensor": lambda _, h: h * torch.log(torch.tensor(float(h.size(1)))),
    "numel": lambda _, h: h * torch.tensor(float(h.numel())),
    "shape": lambda _, h: h / torch.tensor(h.shape).to(h.dtype)[1],
    "list": lambda _, h: h * torch.tensor([1.0, h.shape[1]]).max(),
    "as_tensor": lambda _, h: h * torch.as_tensor(np.float64(h.shape[1])),
    "asarray": lambda _, h: h * torch.asarray([h.shape[1]]),
    "new_tensor": lambda _, h: h * h.new_tensor(h.shape[1]),
    "from_numpy": lambda _, h: h * torch.from_numpy(np.array(float(h.shape[1]))),
    "from_numpy, detached": lambda _, h: h * torch.from_numpy(np.array(float(h.shape[1]))).detach(),
    "from_numpy, data": lambda _, h: h * torch.from_numpy(np.array(float(h.shape[1]))).data,
    "one of each token": lambda _, h: (h.mT * torch.from_numpy(np.ones(h.shape[1]) / h.shape[1])).mT,
    "frombuffer": lambda _, h: torch.frombuffer(bytearray(np.float64(h.shape[1])), dtype=torch.float64) * h,
    "from_numpy, filled later": from_numpy_later,
    "numpy": through_numpy,
    "part of a constant": into_part_of_a_constant,
    "item": lambda _, h: h * torch.tensor(float(h.shape[1])).item(),
    "stride": lambda _, h: h * torch.tensor(h.stride(0)).log(),
    "scalar_tensor": lambda _, h: h * torch.scalar_tensor(h.shape[1]),
    "full": lambda _, h: h * torch.full((), h.shape[1]),
    "fill_": lambda _, h: h * torch.ones(()).fill_(h.shape[1]),
    "eye": lambda _, h: h * torch.eye(h.shape[1]).trace(),
}


@pytest.mark.ranks(2, timeout=120)
def test_tensors_made_of_how_many_tokens_there_are_are_refused_with_their_place():
    for change in NUMBERS.values():
        assert_refused(change)


@pytest.mark.ranks(2, timeout=120)
def test_tensors_of_the_same_numbers_are_exact():
    def change(module, h):
        module.plain.numpy()[1] = 2.0
        module.plain[0] = h.shape[2]
        bound = torch.tensor([-float("inf"), float("nan")])
        return h * torch.tensor(float(h.shape[2])) + module.plain.sum() + (h > bound[0]) + torch.from_numpy(np.ones(1))

    assert_exact(change)


@pytest.mark.ranks(2, timeout=120)
def test_random_numbers_that_all_tokens_share_are_refused():
    draws = {
        "normal_": lambda _, h: h * torch.zeros(1).normal_(),
        "normal": lambda _, h: h * torch.normal(torch.zeros(1), 1.0),
        "bernoulli_": lambda _, h: h * torch.zeros(h.shape[0], 1, 1).bernoulli_(0.5),
        "randperm": lambda _, h: h[..., torch.randperm(h.shape[2])],
    }
    for change in draws.values():
        assert_refused(change, r"draws a random number, another on each rank.*layers\.1")


class Centred(torch.autograd.Function):
    """The same numbers, with a gradient that mixes tokens."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(1, keepdim=True)


centred = Centred.apply  # as models keep them


def hooked(_, h):
    h = h * 1.0
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.roll(1, 1))
    return h


def hooked_in_the_graph(_, h):
    h = h * 1.0
    if h.grad_fn is not None:
        h.grad_fn.register_prehook(lambda gradients: tuple(gradient.roll(1, 1) for gradient in gradients))
    return h


@pytest.mark.ranks(2, timeout=120)
def test_gradients_that_the_models_code_makes_by_itself_are_refused():
    assert_refused(lambda _, h: h + centred(h), r"autograd function, .*\.Centred, whose backward is not read")
    assert_refused(hooked, r"puts hooks on gradients, which are not read, in model\.layers\.1")
    assert_refused(hooked_in_the_graph, r"puts hooks on gradients, which are not read, in model\.layers\.1")
    for place in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.norm", "lm_head"):
        model = small("llama", 2)
        parent, _, name = place.rpartition(".")
        inner = nn.Sequential(model.get_submodule(place), Changing(lambda h: h + centred(h)))
        inner.weight = None if name != "lm_head" else model.lm_head.weight
        setattr(model.get_submodule(parent), name, inner)
        with pytest.raises(ValueError, match=r"Centred, whose backward is not read"):
            apply_cp(model, cp_mesh())


class Changing(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.ranks(2, timeout=120)
def test_layers_that_are_recomputed_have_exact_gradients(reentrant):
    one, mesh = small("llama", 2).train(), cp_mesh()
    model = apply_cp(copy.deepcopy(one), mesh)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    one(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    model(**shard_batch({"input_ids": ids(), "labels": ids()}, mesh)).loss.backward()
    for (name, wanted), found in zip(one.named_parameters(), model.parameters(), strict=True):
        dist.all_reduce(found.grad)
        assert relative_error(found.grad / 2, wanted.grad, 1e-6) < 1e-5, name


@pytest.mark.ranks(2, timeout=120)
def test_what_a_model_does_with_gradients_alone_is_read_with_gradients():
    model = changed(lambda _, h: h.roll(1, 1) if torch.is_grad_enabled() else h)
    one, mesh, batch = copy.deepcopy(model), cp_mesh(), {"input_ids": ids()}
    with torch.no_grad():
        apply_cp(model, mesh)
        out = model(**shard_batch(batch, mesh)).logits
        assert relative_error(unshard_sequence(out, mesh), one(**batch, use_cache=False).logits, 0.0) < 1e-6
    with torch.inference_mode():
        model = apply_cp(copy.deepcopy(one), mesh)
        out = model(**shard_batch(batch, mesh)).logits
        assert relative_error(unshard_sequence(out, mesh), one(**batch, use_cache=False).logits, 0.0) < 1e-6
    with pytest.raises(ValueError, match=r"roll along the sequence .*layers\.1"):
        model(**shard_batch(batch, mesh))


@pytest.mark.ranks(2, timeout=120)
def test_what_a_model_does_for_more_tokens_is_read_when_they_come():
    decisions = {
        "shape": lambda _, h: h * (2.0 if h.shape[1] > 10 else 1.0),
        "size": lambda _, h: h.roll(1, 1) if h.size(1) < 10 else h,
        "sizes": lambda _, h: h * 2 if h.size()[1] * 2 + 1 >= 21 else h,
        "negative dim": lambda _, h: h * 2 if h.size(-2) >= 10.5 else h,
        "flat": lambda _, h: h if h.flatten(0, 1).shape[0] > 20 else h.roll(1, 1),
        "numel": lambda _, h: h if h.numel() // h.shape[-1] > 20 else h.roll(1, 1),
        "equal": lambda _, h: h * (2.0 if h.shape[1] == 8 else 1.0),
    }
    for change in decisions.values():
        assert_refused(change)


@pytest.mark.ranks(2, timeout=120)
def test_decisions_that_are_the_same_for_a_part_and_the_whole_are_exact():
    def change(_, h):
        assert h.shape[1] == h.flatten(0, 1).shape[0] // h.shape[0]
        if h.shape[1] > 2048:
            raise ValueError("too long")
        return h * 2 if h.shape[1] < 10 and h.shape[1] * 2 < 10 else h

    assert_exact(change)
    assert_exact(lambda _, h: h * (2.0 if h.shape[1] > 4 else 1.0))
    assert_exact(lambda _, h: h * 1.0 if h.shape[1] > 10 else 1.0 * h)  # read at the length that comes


@pytest.mark.ranks(2, timeout=120)
def test_more_tokens_than_can_be_read_are_refused_where_their_number_decides():
    model = apply_cp(changed(lambda _, h: h * (2.0 if h.shape[1] > 10000 else 1.0)), cp_mesh())
    with pytest.raises(ValueError, match="decides by how many tokens there are, and 20480 are too many"):
        model(**shard_batch({"input_ids": torch.ones(1, 20480, dtype=torch.int64)}, cp_mesh()))
