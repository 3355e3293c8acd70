"""Ranks that would run other layers, heads or experts than each other: exact as in one process, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers.models.bart.modeling_bart
import transformers.models.opt.modeling_opt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from am_fsdp import fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.heads import small_for
from am_testkit.zoo import small

WIDTH = 16
sums_unused = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.up(self.norm(x)).tanh()


class Choosing(nn.Module):
    """Each stack of layers and head looks at the first number of its batch."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.leave = nn.Linear(WIDTH, 5)

    def run(self, x, layers):
        x = self.enter(x)
        for layer in layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.leave(self.run(x, self.layers))


class HeadsByTask(Choosing):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"left": nn.Linear(WIDTH, 5), "right": nn.Linear(WIDTH, 5)})

    def forward(self, x):
        return self.heads["left" if x[0, 0] > 0 else "right"](self.run(x, self.layers))


class ExpertsInLayers(Choosing):
    def __init__(self):
        super().__init__()
        for layer in self.layers:
            layer.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
            layer.register_forward_hook(lambda m, _, out: m.experts[int(out[0, 0] > 0)](out))


class TwoHeads(Choosing):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return (self.leave if x[0, 0] > 0 else self.other)(self.run(x, self.layers))


class SkippedLayer(Choosing):
    def forward(self, x):
        skipped = self.layers[0 if x[0, 0] > 0 else 1]
        return self.leave(self.run(x, [layer for layer in self.layers if layer is not skipped]))


class ExpertsAsUnits(Choosing):
    """Three layers of which the batch chooses two, in its own order."""

    def forward(self, x):
        first, second = (0, 1) if x[0, 0] > 0 else (1, 0)
        return self.leave(self.run(x, [self.layers[first], self.layers[second]]))


def built(kind):
    torch.manual_seed(0)
    return kind().double().train()


def rows(step, rank):
    """The batch of a rank: its first number is positive on rank 0 and negative on rank 1."""
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2 * step + rank))
    x[0, 0] = x[0, 0].abs() * (1 - 2 * rank)
    return x


def gradients(model):
    """Where a parameter has none in one process, FSDP2 gives zeros. That of a key's bias is none but for rounding."""
    named = ((n, p) for n, p in model.named_parameters() if not n.endswith("k_proj.bias"))
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


def data_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("data_parallel",))


def sharded(model):
    return fsdp2_strategy_parallelize(model, data_mesh(), torch.float64)


@pytest.mark.ranks(2)
@pytest.mark.skipif(not sums_unused, reason="needs torch 2.13")
@pytest.mark.parametrize("kind", [HeadsByTask, ExpertsInLayers])
def test_what_each_rank_chooses_for_itself_within_a_unit_is_exact(kind):
    one, model = built(kind), sharded(built(kind))
    for step in range(3):
        for rank in range(2):
            (one(rows(step, rank)).square().mean() / 2).backward()
        model(rows(step, dist.get_rank())).square().mean().backward()
    assert_same(gradients(model), gradients(one), 1e-10, kind.__name__)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (SkippedLayer, r"some ranks are at layers\.0 and others at layers\.1"),
        (ExpertsAsUnits, r"some ranks are at layers\.0 and others at layers\.1"),
        (
            TwoHeads,
            r"gradients of leave\.bias, leave\.weight, other\.bias, other\.weight would come from some ranks only",
        ),
    ],
)
def test_what_ranks_would_run_apart_is_refused_on_every_rank_in_the_first_forward(kind, why):
    model = sharded(built(kind))
    with pytest.raises(ValueError, match=f"ranks that shard .*{kind.__name__} together .*(?:{why})"):
        model(rows(0, dist.get_rank()))


@pytest.mark.ranks(2)
def test_what_a_later_forward_runs_apart_is_refused_before_it_is_asked_for():
    model = sharded(built(SkippedLayer))
    model(rows(0, 0)).sum().backward()
    model(rows(1, 0)).sum().backward()
    with pytest.raises(ValueError, match=r"this one is at layers\.0, where the first such forward was at layers\.1"):
        model(rows(0, 1))


@pytest.mark.ranks(2)
def test_an_evaluation_may_run_other_layers_than_training():
    model = sharded(built(SkippedLayer))
    model(rows(0, 0)).sum().backward()
    with torch.no_grad():
        model(rows(0, 1))
        model.eval()(rows(0, 1))
    model.train()(rows(1, 0)).sum().backward()


def opt():
    return small("opt", layers=3, layerdrop=0.5).train()


def bart():
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_layerdrop=0.4, decoder_layerdrop=0.5,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config).double().train()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", [opt, bart])
def test_ranks_that_drop_layers_of_their_own_train_as_one_process_does(make, recompute):
    """Random numbers are drawn as if no layer had run that is dropped; all layers of a stack may be dropped."""
    torch.manual_seed(0)
    one = make()
    model = make()
    model.load_state_dict(one.state_dict())
    model = fsdp2_strategy_parallelize(model, data_mesh(), torch.float64, activation_checkpointing=recompute)
    for step in range(5):
        ids = [torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(2 * step + r)) for r in range(2)]
        losses = []
        for rank in range(2):
            torch.manual_seed(100 * step + rank)
            losses.append(one(input_ids=ids[rank], labels=ids[rank], use_cache=False).loss)
            (losses[-1] / 2).backward()
        rank = dist.get_rank()
        torch.manual_seed(100 * step + rank)
        loss = model(input_ids=ids[rank], labels=ids[rank], use_cache=False).loss
        loss.backward()
        assert_same(loss.detach(), losses[rank].detach(), 1e-10, "loss")
        assert_same(gradients(model), gradients(one), 1e-10, f"step {step}")


class Held(Choosing):
    def __init__(self):
        super().__init__()
        self.tied = [self.leave.weight]


def hooked():
    model = Choosing()
    model.leave.weight.register_hook(lambda gradient: gradient * 0)
    return model


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Held, r"Held\.tied holds leave\.weight where nobody finds it"),
        (hooked, r"leave\.weight has a hook on its gradient"),
    ],
)
def test_what_would_stay_with_the_whole_parameter_is_refused_before_anything_is_sharded(kind, why):
    model = kind()
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=why):
        fsdp2_strategy_parallelize(model, data_mesh())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.ranks(2)
def test_a_parametrised_weight_is_not_computed_by_a_layout():
    model = built(Choosing)
    for layer in model.layers:
        nn.utils.parametrizations.spectral_norm(layer.up)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sharded(model)
    assert_same(dict(model.named_buffers()), before, 0.0, "buffers")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_no_part_of_an_encoder_decoder_fills_a_cache_while_its_layers_are_recomputed(mode):
    torch.manual_seed(0)
    one = small_for("translation", "t5", torch.float64).train()
    model = small_for("translation", "t5", torch.float64).train()
    model.load_state_dict(one.state_dict())
    for dropout in (m for each in (one, model) for m in each.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    fsdp2_strategy_parallelize(model, data_mesh(), torch.float64, activation_checkpointing=mode)
    ids = torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(1))
    for each in (one, model):
        each(input_ids=ids, decoder_input_ids=ids).logits.square().mean().backward()
    assert_same(gradients(model), gradients(one), 1e-8, mode)
