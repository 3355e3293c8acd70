"""Experts of one's own are tried with numbers: what ranks would compute otherwise is refused, the rest is exact."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.qwen3_moe.modeling_qwen3_moe
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from am_moe import apply_ep, apply_fsdp, describe_experts, find_experts
from am_moe.expert_parallel.common_form import has_common_form
from am_moe.expert_parallel.experts import ships_with_transformers
from am_moe.expert_parallel.trial import signature, try_with_numbers
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small

Shipped = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
WIDTH = 12


class Own(nn.Module):
    """Experts as `MoE` describes them; what derives from them changes one thing."""

    def __init__(self, experts=4):
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) / 4)
        self.add()

    def add(self):
        pass

    def one(self, rows, expert):
        return rows @ self.weight[expert]

    def sum(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            rows = self.one(hidden_states[token], expert)
            out = out.index_add(0, token, (top_k_weights[token, choice, None] * rows).to(out.dtype))
        return out

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights)


class BufferOfScales(Own):
    def add(self):
        self.register_buffer("scale", torch.ones(self.num_experts))

    def one(self, rows, expert):
        return super().one(rows, expert) * self.scale[expert]


class TensorOfScales(BufferOfScales):
    def add(self):
        self.scale = torch.ones(self.num_experts)


class TableOfExperts(Own):
    def add(self):
        self.register_buffer("order", torch.arange(self.num_experts))

    def one(self, rows, expert):
        return rows @ self.weight[self.order[expert]]


class ActivationOfEach(Own):
    def add(self):
        self.activations = [F.silu] * (self.num_experts - 1) + [F.relu]

    def one(self, rows, expert):
        return self.activations[expert](super().one(rows, expert))


class ModuleOfEach(ActivationOfEach):
    def add(self):
        self.activations = nn.ModuleList([nn.SiLU() for _ in range(self.num_experts - 1)] + [nn.ReLU()])


class LastIsSpecial(Own):
    def one(self, rows, expert):
        return rows if expert == 7 else super().one(rows, expert)


class LessTheMeanWeight(Own):
    def one(self, rows, expert):
        return rows @ (self.weight[expert] - self.weight.mean(0))


class NormalisesWeights(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights / top_k_weights.sum(-1, keepdim=True))


class DetachesOtherChoices(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        weights = torch.cat([top_k_weights[:, :1], top_k_weights[:, 1:].detach()], dim=1)
        return self.sum(hidden_states, top_k_index, weights)


class SquaresTheSum(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights).square()


class ClampsTheSum(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights).clamp(-20, 20)


class AddsTheToken(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states + self.sum(hidden_states, top_k_index, top_k_weights)


class DividesByChoices(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights) / top_k_index.shape[1]


class DividesByExperts(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights) / self.num_experts


class Counts(Own):
    def add(self):
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.calls += 1
        return self.sum(hidden_states, top_k_index, top_k_weights)


class CountsTokens(Own):
    tokens = 0

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.tokens = self.tokens + len(hidden_states)
        return self.sum(hidden_states, top_k_index, top_k_weights)


class BatchNorm(Own):
    def add(self):
        self.norm = nn.BatchNorm1d(WIDTH)

    def one(self, rows, expert):
        return self.norm(super().one(rows, expert)) if len(rows) > 1 else super().one(rows, expert)


class LossOfWeights(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.training:
            self.loss = self.weight.square().mean()
        return F.dropout(self.sum(hidden_states, top_k_index, top_k_weights), 0.1, self.training)


class WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, loss):
        ctx.save_for_backward(loss)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients[0], torch.ones_like(ctx.saved_tensors[0])


class HiddenLossOfWeights(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = self.sum(hidden_states, top_k_index, top_k_weights)
        return WithLoss.apply(out, self.weight.square().sum()) if self.training else out


class Noise(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.sum(hidden_states, top_k_index, top_k_weights) * torch.rand(())


class Raises(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise RuntimeError("where is the router?")


REFUSED = {
    BufferOfScales: "output", TensorOfScales: "output", TableOfExperts: "fails with IndexError",
    ActivationOfEach: "output", ModuleOfEach: "output", LastIsSpecial: "output", LessTheMeanWeight: "output",
    NormalisesWeights: "output", DetachesOtherChoices: "gradient of top_k_weights", SquaresTheSum: "output",
    ClampsTheSum: "output", AddsTheToken: "output", DividesByChoices: "output", DividesByExperts: "output",
    Counts: "the buffer calls", CountsTokens: "leaves tokens", BatchNorm: "the buffer norm",
    LossOfWeights: "leaves loss, which has gradients",
    HiddenLossOfWeights: "gradient of weight", Noise: "another result every time", Raises: "where is the router",
}  # fmt: skip


class Biased(Own):
    def add(self):
        self.bias = nn.Parameter(torch.zeros(self.num_experts, WIDTH))
        self.scale = nn.Parameter(torch.ones(self.num_experts))

    def one(self, rows, expert):
        return super().one(rows, expert) * self.scale[expert] + self.bias[expert]


class SharedNorm(Own):
    def add(self):
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("limit", torch.tensor(7.0))
        self.used = torch.zeros(self.num_experts, dtype=torch.int64)  # of whoever counts outside

    def one(self, rows, expert):
        return self.norm(super().one(rows.clamp(-self.limit, self.limit), expert))


class PositiveRoots(Own):
    def add(self):
        self.variance = nn.Parameter(torch.ones(self.num_experts, WIDTH))

    def one(self, rows, expert):
        return super().one(rows, expert) / self.variance[expert].sqrt()


class DropsOut(Own):
    def one(self, rows, expert):
        return F.dropout(super().one(rows, expert), 0.1, self.training)


class InFloat32(Own):
    def one(self, rows, expert):
        return (rows.float() @ self.weight[expert].float()).to(rows.dtype)


class Caches(Own):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        if not hasattr(self, "cache"):
            self.cache = torch.tensor(0.5)
        return self.sum(hidden_states, top_k_index, top_k_weights) * self.cache


class SaysItHasTheCommonForm(Own):
    """With the flags and parameters by which transformers chooses kernels, and a forward that does more."""

    has_gate, has_bias, is_transposed = True, False, False

    def add(self):
        del self.weight
        self.gate_up_proj = nn.Parameter(torch.randn(self.num_experts, 2 * WIDTH, WIDTH) / 4)
        self.down_proj = nn.Parameter(torch.randn(self.num_experts, WIDTH, WIDTH) / 4)

    def one(self, rows, expert):
        gate, up = (rows @ self.gate_up_proj[expert].T).chunk(2, -1)
        return 2 * (F.silu(gate) * up) @ self.down_proj[expert].T


EXACT = [Own, Biased, SharedNorm, PositiveRoots, DropsOut, InFloat32, Caches, SaysItHasTheCommonForm]


class Layer(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.router = nn.Linear(WIDTH, experts.num_experts, bias=False)
        self.experts = experts

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, ids, weights)


def build(kind, experts=8):
    torch.manual_seed(0)
    return nn.Sequential(Layer(kind(experts)), Layer(kind(experts))).double().eval()


def experts_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("ep",))


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.ranks(2)
def test_experts_whose_ranks_would_compute_something_else_are_refused_before_anything_is_changed(kind):
    model = build(kind)
    parameters, buffers = dict(model.named_parameters()), copy.deepcopy(dict(model.named_buffers()))
    attributes, generator = dict(vars(model[0].experts)), torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"experts of 0\.experts can.*{REFUSED[kind]}.*See am_moe\.MoE"):
        apply_ep(model, experts_mesh())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
    assert vars(model[0].experts).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(model[0].experts).items())
    assert torch.get_rng_state().equal(generator)


@pytest.mark.parametrize("experts", [2, 4, 8])
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.ranks(2)
def test_experts_of_ones_own_that_pass_train_like_one_process(kind, experts):
    model = build(kind, experts)
    one = copy.deepcopy(model)
    apply_ep(model, experts_mesh())
    apply_fsdp(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",)), True, False)
    compare(model, one, lambda m, x: m(x).square().mean(), torch.randn(16, WIDTH, dtype=torch.float64))


def compare(model, one, loss, batch):
    half = len(batch) // 2
    share = batch[half * dist.get_rank() :][:half]
    loss(model, share).backward()
    loss(one, batch).backward()
    assert_same(gradients(model), gradients(one), 1e-6)


class Scaled(Shipped):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2.5 * super().forward(hidden_states.clamp(-0.5, 0.5), top_k_index, top_k_weights)


class OtherGate(Shipped):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.tanh(gate) * up


class Renamed(Shipped):
    pass


def wrapped(experts):
    inner = experts.forward
    experts.forward = lambda *args, **kwargs: 2.5 * inner(*args, **kwargs)


@pytest.mark.parametrize("change", [Scaled, OtherGate, Renamed, wrapped])
@pytest.mark.ranks(2)
def test_a_forward_that_overrides_or_wraps_that_of_transformers_is_the_one_that_runs(change):
    def changed():
        model = tiny("qwen3_moe", layers=2)
        for _, experts in find_experts(model):
            if change is wrapped:
                wrapped(experts)
            else:
                experts.__class__ = change
        return model

    model, one = changed(), changed()
    experts = find_experts(model)[0][1]
    assert has_common_form(experts, describe_experts(model)[0]) == (change is Renamed)
    apply_ep(model, experts_mesh())
    assert has_common_form(experts, describe_experts(model)[0]) == (change is Renamed)
    apply_fsdp(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("dp",)), True, False)
    ids, labels = token_batch(4, 6)

    def loss(model, rows):
        return next_token_loss(model(ids[rows], use_cache=False).logits, labels[rows])

    compare(model, one, loss, torch.arange(4))


def test_a_forward_with_a_kernel_that_transformers_does_not_ship_is_not_taken_for_the_common_form():
    model = tiny("qwen3_moe", layers=1)
    experts, found = find_experts(model)[0][1], describe_experts(model)[0]
    assert has_common_form(experts, found)
    experts.config._experts_implementation = "mine"
    assert not has_common_form(experts, found)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("model_type", ["dbrx", "gpt_oss", "jetmoe", "llama4_text", "longcat_flash", "nemotron_h"])
def test_what_derives_from_a_class_of_transformers_and_changes_nothing_passes(model_type, ranks):
    model = small(model_type)
    if not (found := describe_experts(model)):
        pytest.skip("its experts are not stacked in this transformers")
    module = model.get_submodule(found[0].name)
    assert ships_with_transformers(module)
    module.__class__ = type("Derived", (type(module),), {})
    assert not ships_with_transformers(module)
    try_with_numbers(found[0], module, ranks, "cpu")


@pytest.mark.parametrize("shape", [(8, 32, 16), (64, 512, 128)])
def test_experts_on_meta_are_tried_and_stay_there(shape):
    experts, width, inner = shape

    class Wide(SaysItHasTheCommonForm):
        def add(self):
            super().add()
            self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width, dtype=torch.bfloat16))
            self.down_proj = nn.Parameter(torch.empty(experts, width, inner, dtype=torch.bfloat16))

    class Normalised(Wide):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return self.sum(hidden_states, top_k_index, top_k_weights / top_k_weights.sum(-1, keepdim=True))

    with torch.device("meta"):
        module, wrong = Wide(experts), Normalised(experts)
    try_with_numbers(describe_experts(module)[0], module, 8, "cpu")
    with pytest.raises(ValueError, match="its output is off by"):
        try_with_numbers(describe_experts(wrong)[0], wrong, 8, "cpu")
    assert all(parameter.is_meta and parameter.shape[0] == experts for parameter in module.parameters())
    assert module.num_experts == experts


def test_layers_of_one_form_are_tried_once_and_layers_with_other_values_again():
    first, second = build(ActivationOfEach)
    assert signature(first.experts) == signature(second.experts)
    second.experts.layer_idx = 1
    assert signature(first.experts) == signature(second.experts)
    second.experts.activations[0] = F.relu
    assert signature(first.experts) != signature(second.experts)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.ranks(2)
def test_gradient_hooks_on_expert_parameters_are_refused_and_taken_after_the_layout(register):
    model = build(Own)
    getattr(model[1].experts.weight, register)(lambda gradient: None)
    with pytest.raises(
        ValueError, match=r"\['weight'\] of 1\.experts have gradient hooks.*register them after apply_ep"
    ):
        apply_ep(model, experts_mesh())
    model, calls = build(Own), []
    apply_ep(model, experts_mesh())
    getattr(model[1].experts.weight, register)(lambda gradient: calls.append(gradient) and None)
    model(torch.randn(6, WIDTH, dtype=torch.float64)).sum().backward()
    assert len(calls) == 1


@pytest.mark.ranks(2)
def test_tied_expert_parameters_are_refused_a_shared_module_and_marks_are_kept():
    model = build(Own)
    model[1].experts.weight = model[0].experts.weight
    with pytest.raises(ValueError, match=r"\['0\.experts\.weight', '1\.experts\.weight'\] are one and the same"):
        apply_ep(model, experts_mesh())
    model = build(Own)
    model[1].experts.twice = model[1].experts.weight
    with pytest.raises(ValueError, match=r"\['1\.experts\.weight', '1\.experts\.twice'\] are one and the same"):
        apply_ep(model, experts_mesh())
    model = build(Own)
    model[1].experts = model[0].experts
    model[0].experts.weight._no_weight_decay = True
    apply_ep(model, experts_mesh())
    assert model[1].experts.weight is model[0].experts.weight
    assert model[0].experts.weight._no_weight_decay
