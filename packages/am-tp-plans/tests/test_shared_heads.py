"""Attention on more ranks than it has key/value heads: neighbouring ranks share one, and nothing else changes."""

from __future__ import annotations

import copy
import itertools
import pickle
import types

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_tp_plans import (
    HeadsPerRank,
    add_sequence_parallelism,
    apply_plan,
    check_gradients,
    explain_plan,
    fit_plan,
    infer_plan,
    resolve_plan,
)
from am_tp_plans.fit import check_plan
from am_tp_plans.proof.rehearsal import rehearse
from am_tp_plans.sources.translate import complete
from am_tp_plans.styles.heads import fewest_ranks
from am_tp_styles import KeyValueColwiseParallel, use_tp_linear

SEQUENCE = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


def grouped(family, heads=8, key_value_heads=2, **settings):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "layers": 2} | settings
    return tiny(family, hidden_size=64, **sizes)


def compare(model, plan=None, sequence_parallel=False, steps=2, tokens=16, then=lambda model: None):
    """A model in the plan and a copy of it in one process, step by step."""
    exact = 1e-6  # the weights are float64, but norms and the softmax of eager attention are float32
    whole, names = copy.deepcopy(model), list(model.state_dict())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apply_plan(base, axis(), resolve_plan(base, plan, sequence_parallel=sequence_parallel))
    assert list(model.state_dict()) == names
    then(base)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9) for m in (model, whole)
    ]
    for step in range(steps):
        ids, labels = token_batch(2, tokens, seed=step)
        losses = [next_token_loss(each(ids, use_cache=False).logits, labels) for each in (model, whole)]
        assert_same(*losses, exact, f"loss of step {step}")
        for loss in losses:
            loss.backward()
        assert_same(gradients(model), gradients(whole), exact, f"gradients of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = dict(whole.named_parameters(remove_duplicate=False))
    assert_same(dict(model.named_parameters(remove_duplicate=False)), weights, 100 * exact, "weights")


FAMILIES = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {"tied": True}),
    ("qwen3", {"key_value_heads": 1}),
    ("qwen3_moe", {"heads": 16}),
    ("gemma3_text", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
]


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@SEQUENCE
@pytest.mark.ranks(4)
def test_two_key_value_heads_on_four_ranks(family, settings, attention, sequence_parallel):
    compare(grouped(family, attention=attention, **settings), None, sequence_parallel)


ON_EIGHT = list(itertools.product(["llama", "qwen2", "qwen3", "qwen3_moe"], [2, 4], [False, True]))


@pytest.mark.parametrize(("family", "key_value_heads", "sequence_parallel"), ON_EIGHT)
@pytest.mark.ranks(8, timeout=180)
def test_two_and_four_key_value_heads_on_eight_ranks(family, key_value_heads, sequence_parallel):
    attention = "eager" if (key_value_heads == 2) == sequence_parallel else "sdpa"
    heads = 8 if key_value_heads == 2 else 16  # one query head of a rank, or two
    compare(grouped(family, heads, key_value_heads, attention=attention), None, sequence_parallel, steps=1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@SEQUENCE
@pytest.mark.ranks(4)
def test_adapters_on_keys_and_values_train_as_in_one_process(dora, sequence_parallel):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=3, target_modules=targets, use_dora=dora, lora_bias=not dora)
    model = get_peft_model(grouped("qwen2", attention="sdpa"), config).double()
    torch.manual_seed(1)
    with torch.no_grad():  # an adapter starts at zero, which would leave lora_A without a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    compare(model, None, sequence_parallel)


@pytest.mark.ranks(4)
def test_an_adapter_is_added_merged_and_switched_on_shared_heads():
    model = get_peft_model(grouped("llama", layers=1), LoraConfig(r=2, target_modules=["k_proj", "v_proj"])).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1) if "lora_B" in name else None
    whole = copy.deepcopy(model)
    apply_plan(model.get_base_model(), axis(), resolve_plan(model.get_base_model()))
    ids, _ = token_batch(2, 8)
    for each in (model, whole):
        each.merge_adapter()
    assert_same(model(ids, use_cache=False).logits, whole(ids, use_cache=False).logits, 1e-6, "merged")
    for each in (model, whole):
        each.unmerge_adapter()
        torch.manual_seed(2)
        each.add_adapter("second", LoraConfig(r=3, target_modules=["k_proj", "v_proj"], init_lora_weights=False))
        each.set_adapter("second")
        each.double()
    outputs = [each(ids, use_cache=False).logits for each in (model, whole)]
    assert_same(*outputs, 1e-6, "the second adapter")
    for output in outputs:
        output.square().mean().backward()
    assert_same(gradients(model), gradients(whole), 1e-6, "gradients")


@pytest.mark.parametrize("compiled", ["layers", "model"])
@SEQUENCE
@pytest.mark.ranks(4, timeout=240)
def test_a_compiled_model_trains_as_in_one_process(compiled, sequence_parallel):
    def compile_it(model):
        use_tp_linear(model)
        for part in model.model.layers if compiled == "layers" else [model]:
            part.compile(backend="aot_eager")

    compare(grouped("qwen3", layers=1, attention="sdpa"), None, sequence_parallel, then=compile_it)


@SEQUENCE
@pytest.mark.ranks(8, timeout=120)
def test_under_fsdp_on_two_times_four_ranks(sequence_parallel):
    mesh = init_device_mesh(device_type(), (2, 4), mesh_dim_names=("dp", "tp"))
    model = grouped("qwen3", attention="sdpa", attention_bias=True)
    whole = copy.deepcopy(model)
    apply_plan(model, mesh["tp"], resolve_plan(model, sequence_parallel=sequence_parallel))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for step in range(3):
        ids, labels = token_batch(4, 16, seed=step)
        mine = slice(2 * mesh.get_local_rank("dp"), 2 * mesh.get_local_rank("dp") + 2)
        next_token_loss(model(ids[mine], use_cache=False).logits, labels[mine]).backward()
        next_token_loss(whole(ids, use_cache=False).logits, labels).backward()
        assert_same(gradients(model), gradients(whole), 1e-6, f"gradients of step {step}")
        check_gradients(model, mesh["tp"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    keys = model.model.layers[0].self_attn.k_proj.weight
    assert keys.full_tensor().shape == keys.shape == (16, 64)
    assert_same(dict(model.named_parameters()), dict(whole.named_parameters()), 1e-6, "weights")


@pytest.mark.parametrize("name", ["mistral", "stablelm", "glm4"])
@pytest.mark.parametrize("make", ["brought", "inferred"])
@SEQUENCE
@pytest.mark.ranks(4, timeout=120)
def test_brought_and_inferred_plans_share_heads_by_themselves(name, make, sequence_parallel):
    model = grouped(name, attention="sdpa")
    if make == "inferred":
        plan = infer_plan(model, ranks=4)
    elif name == "stablelm":
        plan = resolve_plan(model, infer=True)  # it brings none; found at two ranks, where heads are not shared
    else:
        plan = resolve_plan(model)
    compare(model, add_sequence_parallelism(model, plan) if sequence_parallel else plan)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.ranks(4)
def test_padded_batches_and_generation_read_the_shared_heads(attention):
    """A mask, and a step of one token, take other ways through the attention than a batch of ids alone."""
    model = grouped("qwen2", attention=attention, dtype=torch.float32)
    whole, (ids, labels) = copy.deepcopy(model), token_batch(2, 12)
    apply_plan(model, axis(), resolve_plan(model))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    losses = [
        next_token_loss(each(ids, attention_mask=mask, use_cache=False).logits, labels) for each in (model, whole)
    ]
    assert_same(*losses, 1e-5)
    for loss in losses:
        loss.backward()
    assert_same(gradients(model), gradients(whole), 1e-4, "gradients")
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(*(each.generate(ids, **settings) for each in (model, whole)))


@pytest.mark.ranks(4)
def test_shared_heads_under_autocast_are_those_of_one_process_under_autocast():
    model = grouped("llama", attention="sdpa", dtype=torch.float32)
    whole, (ids, labels) = copy.deepcopy(model), token_batch(2, 16)
    apply_plan(model, axis(), resolve_plan(model))
    for each in (model, whole):
        with torch.autocast(device_type(), torch.bfloat16):
            loss = next_token_loss(each(ids, use_cache=False).logits, labels)
        loss.backward()
    assert_same(gradients(model), gradients(whole), 0.05, "gradients")


@SEQUENCE
@pytest.mark.ranks(3)
def test_nine_query_and_three_key_value_heads_are_tried_on_three_ranks_and_train_there(sequence_parallel):
    sizes = {"hidden_size": 72, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = tiny("mistral", layers=2, attention="sdpa", **sizes)
    plan = resolve_plan(model, sequence_parallel=sequence_parallel)
    with pytest.raises(ValueError, match=r"num_attention_heads=9 does not divide over 2 .*; an axis can have \[1, 3\]"):
        fit_plan(model, plan, 2)
    compare(model, plan, tokens=12)


@pytest.mark.ranks(4)
def test_copies_and_pickles_compute_with_their_own_weights():
    model, (ids, labels) = grouped("qwen2", layers=1), token_batch(2, 8)
    whole = copy.deepcopy(model)
    apply_plan(model, axis(), resolve_plan(model))
    attention = model.model.layers[0].self_attn
    twins = [copy.deepcopy(model), copy.deepcopy(whole)]
    with torch.no_grad():
        for each in twins:
            each.model.layers[0].self_attn.v_proj.weight.mul_(2)
    for mine, theirs in ((twins[0], twins[1]), (model, whole)):
        losses = [next_token_loss(each(ids, use_cache=False).logits, labels) for each in (mine, theirs)]
        assert_same(*losses, 1e-6)
        for loss in losses:
            loss.backward()
        assert_same(gradients(mine), gradients(theirs), 1e-6, "gradients")
    again = pickle.loads(pickle.dumps(attention.k_proj))
    x = torch.randn(2, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), attention.k_proj(x))
    assert again(x).shape == (2, 3, 8)
    assert (attention.num_key_value_groups, whole.model.layers[0].self_attn.num_key_value_groups) == (2, 4)
    assert model.config.num_key_value_heads == 2


@pytest.mark.ranks(8, timeout=120)
def test_a_checkpoint_of_shared_heads_is_one_of_the_plain_model(tmp_path_factory):
    folder = [str(tmp_path_factory.mktemp("checkpoint"))]
    dist.broadcast_object_list(folder)
    mesh = init_device_mesh(device_type(), (2, 4), mesh_dim_names=("dp", "tp"))
    model = grouped("qwen2", layers=1)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    apply_plan(model, mesh["tp"], resolve_plan(model))
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight.to_local(), plain[KEYS])
    fully_shard(model, mesh=mesh["dp"])
    dcp.save(model.state_dict(), checkpoint_id=folder[0])
    read = {name: torch.zeros_like(value) for name, value in plain.items()}
    dcp.load(read, checkpoint_id=folder[0])
    assert all(torch.equal(read[name], value) for name, value in plain.items())
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.zero_()
    dcp.load(model.state_dict(), checkpoint_id=folder[0])
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight.full_tensor(), plain[KEYS])


KEYS = "model.layers.0.self_attn.k_proj.weight"


def test_a_report_says_which_heads_are_shared():
    model = grouped("llama")
    report = explain_plan(model, resolve_plan(model), 8)
    row = next(row for row in report.rows if row.key.endswith("k_proj"))
    assert row.style == "KeyValueColwise (whole, 2 heads)"
    assert row.parameters == 2 * 16 * 64
    assert "model.layers.*.self_attn.k_proj.weight" in report.whole


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "ranks", "words"),
    [
        (9, 3, 2, r"num_attention_heads=9 does not divide over 2 tensor-parallel ranks; an axis can have \[1, 3, 9\]"),
        (12, 3, 2, r"12 query heads and num_key_value_heads=3, .* 2 tensor-parallel ranks; .* \[1, 3, 6, 12\]"),
        (12, 4, 6, r"12 query heads and num_key_value_heads=4, .* 6 tensor-parallel ranks; .* \[1, 2, 4, 12\]"),
        (14, 2, 8, r"num_attention_heads=14 does not divide over 8 tensor-parallel ranks; .* \[1, 2, 14\]"),
    ],
)
def test_an_axis_that_heads_do_not_fit_is_refused_with_those_that_fit(heads, key_value_heads, ranks, words):
    sizes = {"intermediate_size": 252, "vocab_size": 252, "hidden_size": 252}
    model = tiny("llama", num_attention_heads=heads, num_key_value_heads=key_value_heads, **sizes)
    with pytest.raises(ValueError, match=words):
        explain_plan(model, resolve_plan(model), ranks)


def test_sizes_that_other_widths_do_not_fit_are_not_named():
    """SmolLM2's numbers: nine ranks would fit the heads, but not its MLP."""
    model = tiny("llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=72, intermediate_size=192)
    with pytest.raises(ValueError, match=r"an axis can have \[1, 3\]"):
        explain_plan(model, resolve_plan(model), 2)


def repeated(x, times):
    if times == 1:
        return x
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def attend(q, k, v, **settings):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings)


def by_hand(q, k, v):
    return (q @ k.transpose(2, 3)).softmax(-1) @ v


def of_another_where_alone(self, q, k, v):
    """On a rank with one query head it reads values for keys."""
    return by_hand(q, repeated(k if self.num_key_value_groups > 1 else v, self.num_key_value_groups), self.each(v))


# name: (what an attention computes of its heads `(B, H, S, D)`, whether ranks may share its key/value heads)
ATTENTIONS = {
    "repeated by hand": (lambda self, q, k, v: by_hand(q, self.each(k), self.each(v)), True),
    "repeated": (lambda self, q, k, v: attend(q, self.each(k), self.each(v)), True),
    "grouped by torch": (lambda self, q, k, v: attend(q, k, v, enable_gqa=True), True),
    "interleaved": (lambda self, q, k, v: by_hand(q, self.interleaved(q, k), self.interleaved(q, v)), True),
    "tiled": (lambda self, q, k, v: by_hand(q, k.repeat(1, self.groups(q, k), 1, 1), self.each(v)), False),
    "a number of its own": (lambda self, q, k, v: by_hand(q, repeated(k, 4), repeated(v, 4)), False),
    "another where alone": (of_another_where_alone, "not alone"),
    "swapped heads": (lambda self, q, k, v: by_hand(q, self.each(k.flip(1)), self.each(v)), False),
    "without the mean head": (lambda self, q, k, v: by_hand(q, self.each(k - k.mean(1, True)), self.each(v)), False),
    "a number per head": (lambda self, q, k, v: by_hand(q, self.each(k * self.per_head), self.each(v)), False),
    "keys times their largest": (lambda self, q, k, v: by_hand(q, self.each(k), self.each(v)) * k.amax(), False),
    "one key head alone": (lambda self, q, k, v: by_hand(q, self.each(k), self.each(v)) + v[:, :1], False),
    "repeated values alone": (lambda self, q, k, v: q * 0 + self.each(v), True),
    "values alone": (lambda self, q, k, v: v, False),
}


class Attention(nn.Module):
    def __init__(self, computes):
        super().__init__()
        self.head_dim, self.num_key_value_groups, self.computes = 4, 4, computes
        self.q_proj, self.o_proj = nn.Linear(16, 32), nn.Linear(32, 16)
        self.k_proj, self.v_proj = nn.Linear(16, 8, bias=False), nn.Linear(16, 8)  # softmax forgets a bias of keys
        self.scale, self.per_head = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 1, 1))

    def each(self, x):
        return repeated(x, self.num_key_value_groups)

    def interleaved(self, q, x):
        return x.repeat_interleave(self.groups(q, x), 1)

    def groups(self, q, k):
        return q.shape[1] // k.shape[1]

    def forward(self, hidden):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        out = self.computes(self, q, k, v).transpose(1, 2).flatten(2)
        return self.o_proj(F.pad(out, (0, 32 - out.shape[-1])) if self.computes is VALUES_ALONE else out)


VALUES_ALONE = ATTENTIONS["values alone"][0]


class Decoder(nn.Module):
    def __init__(self, computes):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attn = nn.Embedding(16, 16), Attention(computes)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return hidden + self.attn(hidden)


def plan_of_projections():
    return {f"attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"attn.o_proj": RowwiseParallel()}


def is_accepted(model, ranks):
    try:
        return "attn.k_proj" in rehearse(model, check_plan(model, plan_of_projections(), ranks), ranks).ran
    except ValueError:
        return False


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_that_counts_its_heads_in_another_way_is_refused(name):
    computes, expected = ATTENTIONS[name]
    model = Decoder(computes).double()
    assert is_accepted(model, 4) == bool(expected), "two query heads of a rank"
    assert is_accepted(model, 8) == (expected is True), "one"


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (4, 8)])
def test_every_attention_that_is_not_refused_is_exact(ranks):
    for name, (computes, expected) in ATTENTIONS.items():
        if expected is not True:
            continue
        one = Decoder(computes).double()
        model, ids = copy.deepcopy(one), torch.randint(0, 16, (2, 8), generator=torch.Generator().manual_seed(1))
        apply_plan(model, axis(), complete(model, plan_of_projections()))
        outputs = [each(ids) for each in (model, one)]
        assert_same(*outputs, 1e-12, f"the output with {name}")
        for output in outputs:
            output.square().sum().backward()
        grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, one)]
        assert_same(*grads, 1e-10, f"the gradients with {name}")
        assert len(grads[0]) == len(grads[1])


def part_of(model):
    """The second half of a model, as a pipeline cut leaves it: what it does not hold has no parameters."""
    model.model.embed_tokens, model.model.layers[0] = nn.Identity(), nn.Identity()
    return model


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.ranks(4)
def test_a_part_of_a_pipeline_shares_heads_as_the_whole_model_was_shown_to(name):
    model = grouped(name)
    plan, whole = resolve_plan(model), copy.deepcopy(model)
    fitted = fit_plan(model, plan, 4)
    if name == "mistral":
        with pytest.raises(ValueError, match=r"self_attn\.k_proj has fewer .* fit_plan\(model, plan, 4\) of the whole"):
            apply_plan(part_of(copy.deepcopy(model)), axis(), plan)
        plan = fitted
    apply_plan(part_of(model), axis(), plan)
    hidden = torch.randn(2, 8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = []
    for each in (model, whole):
        rotary = each.model.rotary_emb(hidden, torch.arange(8)[None])
        outputs.append(each.model.layers[1](hidden, attention_mask=None, position_embeddings=rotary))
        outputs[-1].square().mean().backward()
    assert_same(*outputs, 1e-6, "output")
    assert_same(gradients(model.model.layers[1]), gradients(whole.model.layers[1]), 1e-6, "gradients")


def test_fused_projections_and_other_styles_do_not_share_heads():
    model = tiny("phi3")
    with pytest.raises(
        ValueError, match=r"2 key/value heads for 4 ranks, .*linears of their own; it has \['qkv_proj'\]"
    ):
        fit_plan(model, resolve_plan(model), 4)
    model = grouped("llama")
    plan = resolve_plan(model) | {"model.layers.*.self_attn.k_proj": ColwiseParallel(use_local_output=False)}
    with pytest.raises(ValueError, match=r"k_proj has ColwiseParallel, but 2 heads are shared .* plain output"):
        fit_plan(model, plan, 4)
    plan = resolve_plan(model) | {"model.layers.*.self_attn.k_proj": KeyValueColwiseParallel(2)}
    with pytest.raises(ValueError, match=r"k_proj has KeyValueColwiseParallel, but 2 heads are shared"):
        fit_plan(model, plan, 4)


@pytest.mark.parametrize("ranks", [4, 8])
def test_a_plan_that_shares_heads_and_does_not_tell_the_attention_is_refused(ranks):
    model = grouped("llama")
    own = {f"model.layers.*.self_attn.{name}_proj": KeyValueColwiseParallel(2) for name in "kv"}
    with pytest.raises(ValueError, match="the plan does not fit LlamaForCausalLM"):
        fit_plan(model, resolve_plan(model) | own, ranks)
    told = {"model.layers.*.self_attn": HeadsPerRank(by={"num_key_value_groups": ranks // 2})}
    assert fit_plan(model, resolve_plan(model) | own | told, ranks)


@pytest.mark.ranks(4)
def test_a_plan_that_would_be_wrong_is_refused_on_every_rank_and_changes_nothing():
    model = Decoder(ATTENTIONS["tiled"][0]).double()
    with pytest.raises(ValueError, match="the plan does not fit Decoder"):
        apply_plan(model, axis(), plan_of_projections())
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.attn.num_key_value_groups == 4


@pytest.mark.parametrize(
    ("heads", "of_keys", "least", "ranks"),
    [
        (9, 3, 2, 3),
        (8, 2, 2, 2),
        (8, 2, 4, 4),
        (8, 2, 3, 4),
        (4, 4, 2, 2),
        (6, 4, 4, 4),
        (8, None, 3, 4),
        (None, 2, 3, 3),
    ],
)
def test_the_smallest_axis_that_heads_fit(heads, of_keys, least, ranks):
    model = nn.Module()
    model.config = types.SimpleNamespace(num_attention_heads=heads, num_key_value_heads=of_keys)
    assert fewest_ranks(model, least) == ranks
