"""Families under tensor and sequence parallelism give what one process gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
import transformers.models.gemma3.modeling_gemma3
import transformers.models.llama.modeling_llama
import transformers.models.ministral3.modeling_ministral3
import transformers.models.phi3.modeling_phi3
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small
from am_tp_plans import (
    PARALLELIZE_FUNCTIONS,
    RotaryEmbedParallel,
    VocabParallelEmbedding,
    apply_plan,
    phi3_with_whole_attention,
    resolve_plan,
)
from am_tp_styles import translate_to_lora

FAMILIES = [
    ("llama", {}),
    ("llama", {"tied": True, "pad_token_id": 60}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3", {"tied": True}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"tied": True, "mlp_only_layers": [1]}),
    ("gemma3_text", {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    ("gemma3_text", {"tied": True, "final_logit_softcapping": 5.0}),
    ("ministral3", {}),
    ("phi3", {"sliding_window": None}),
]
SEQUENCE = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


def sharded(model, sequence_parallel):
    return apply_plan(model, axis(), resolve_plan(model, sequence_parallel=sequence_parallel))


def compare(family, settings, sequence_parallel):
    exact = 1e-6 if family == "gemma3_text" else 1e-10  # Gemma3 has float32 in its norms whatever the model's dtype
    model = tiny(family, num_key_value_heads=4, **settings)
    whole, names = copy.deepcopy(model), list(model.state_dict())
    sharded(model, sequence_parallel)
    assert list(model.state_dict()) == names
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (model, whole)]
    for step in range(2):
        ids, labels = token_batch(2, 12, seed=step)
        outputs = []
        for each in (model, whole):
            outputs.append(each(ids, use_cache=False).logits)
            next_token_loss(outputs[-1], labels).backward()
        assert_same(*outputs, exact, f"logits of step {step}")
        assert_same(gradients(model), gradients(whole), exact, f"gradients of step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = dict(whole.named_parameters(remove_duplicate=False))
    assert_same(dict(model.named_parameters(remove_duplicate=False)), weights, 100 * exact, "weights")


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=str)
@SEQUENCE
@pytest.mark.ranks(2)
def test_logits_gradients_and_steps_equal_one_process_on_two_ranks(family, settings, sequence_parallel):
    compare(family, settings, sequence_parallel)


@pytest.mark.parametrize(("family", "settings"), [FAMILIES[i] for i in (0, 2, 4, 5, 7, 9, 10)], ids=str)
@SEQUENCE
@pytest.mark.ranks(4)
def test_logits_gradients_and_steps_equal_one_process_on_four_ranks(family, settings, sequence_parallel):
    compare(family, settings, sequence_parallel)


@SEQUENCE
@pytest.mark.ranks(2)
def test_a_classifier_and_a_multimodal_model_equal_one_process_on_two_ranks(sequence_parallel):
    compare_classifier_and_multimodal(sequence_parallel)


@SEQUENCE
@pytest.mark.ranks(4)
def test_a_classifier_and_a_multimodal_model_equal_one_process_on_four_ranks(sequence_parallel):
    compare_classifier_and_multimodal(sequence_parallel)


def compare_classifier_and_multimodal(sequence_parallel):
    classifier, multimodal = tiny_classifier(), tiny_multimodal()
    ids, _ = token_batch(2, 12)
    image = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with_image = torch.cat([torch.full((2, 4), 90), ids.clamp(1, 80)], dim=1)
    kinds = torch.cat([torch.ones(2, 4, dtype=torch.int64), torch.zeros_like(ids)], dim=1)
    for model, inputs, exact in (
        (classifier, {"input_ids": ids.clamp(min=1)}, 1e-10),
        (multimodal, {"input_ids": with_image, "pixel_values": image, "token_type_ids": kinds}, 1e-6),
    ):
        whole = copy.deepcopy(model)
        sharded(model, sequence_parallel)
        outputs = [each(**inputs, use_cache=False).logits for each in (model, whole)]
        assert_same(*outputs, exact, "logits")
        for output in outputs:
            output.square().mean().backward()
        assert_same(gradients(model), gradients(whole), exact, "gradients")


def tiny_classifier():
    model = tiny("qwen3", num_key_value_heads=4)
    torch.manual_seed(0)
    return transformers.Qwen3ForSequenceClassification(model.config).double()


def tiny_multimodal():
    text = tiny("gemma3_text", sliding_window=4, num_key_value_heads=4).config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_id=90
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).double()


@pytest.mark.ranks(2)
def test_phi3_is_sharded_more_than_with_whole_attention_which_gives_the_same():
    model = tiny("phi3")
    whole, other = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(other, axis(), phi3_with_whole_attention(other))
    sharded(model, False)
    assert model.model.layers[0].self_attn.qkv_proj.weight.to_local().shape == (32, 32)
    assert model.config.num_attention_heads == 4
    ids, labels = token_batch(2, 12)
    for each in (model, other, whole):
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    for each in (model, other):
        assert_same(gradients(each), gradients(whole), 1e-10, "gradients")
    with pytest.raises(ValueError, match="phi3_with_whole_attention has no sequence parallelism"):
        phi3_with_whole_attention(whole, True)


@pytest.mark.ranks(2)
def test_rotary_tables_are_of_the_whole_sequence_though_the_hidden_state_is_a_shard():
    model = tiny("llama")
    hidden, positions = torch.randn(2, 12, 32, dtype=torch.float64), torch.arange(12)[None]
    expected = model.model.rotary_emb(hidden, positions)
    apply_plan(model, axis(), {"model.rotary_emb": RotaryEmbedParallel(use_local_output=True)})
    tables = model.model.rotary_emb(hidden.chunk(2, 1)[dist.get_rank()], positions)
    assert_same(dict(enumerate(tables)), dict(enumerate(expected)), 0.0)
    apply_plan(model, axis(), {"model.rotary_emb": RotaryEmbedParallel(use_local_output=False)})
    assert all(isinstance(table, DTensor) for table in model.model.rotary_emb(hidden, positions))


@SEQUENCE
@pytest.mark.ranks(2)
def test_tied_weights_stay_one_parameter(sequence_parallel):
    model = sharded(tiny("qwen3", tied=True), sequence_parallel)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.sequence_shards == (2 if sequence_parallel else 1)


class Collectives(TorchDispatchMode):
    """How many there are. (`CommDebugMode` hands modules other tensors than it is given, which then share no sums.)"""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        self.number += space in ("c10d", "_c10d_functional") and "wait" not in name
        return NotImplemented if any(issubclass(kind, DTensor) for kind in types) else func(*args, **(kwargs or {}))


@pytest.mark.ranks(2)
def test_a_layer_costs_two_collectives_each_way():
    counts = {}
    for layers in (2, 3):
        for sequence_parallel in (False, True):
            model = sharded(tiny("llama", layers=layers), sequence_parallel)
            ids, labels = token_batch(2, 12)
            with Collectives() as forward:
                loss = next_token_loss(model(ids, use_cache=False).logits, labels)
            with Collectives() as backward:
                loss.backward()
            counts[layers, sequence_parallel] = (forward.number, backward.number)
    plain = [b - a for a, b in zip(counts[2, False], counts[3, False], strict=True)]
    sequence = [b - a for a, b in zip(counts[2, True], counts[3, True], strict=True)]
    assert plain == [2, 2]
    assert sequence == [4, 4], "a gather and a reduce-scatter around each half; norms' gradients are summed together"


@pytest.mark.ranks(2)
def test_a_model_on_meta_is_sharded_without_weights_and_trains_when_it_gets_them():
    whole = tiny("qwen3", num_key_value_heads=4)
    with torch.device("meta"):
        model = tiny("qwen3", num_key_value_heads=4)
    sharded(model, sequence_parallel=True)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device=device_type())
    with torch.no_grad():
        for name, value in whole.named_parameters():
            mine = model.get_parameter(name)
            mine.copy_(distribute_tensor(value, mine.device_mesh, mine.placements))
        for mine, theirs in zip(model.buffers(), whole.buffers(), strict=True):
            mine.copy_(theirs)
    ids, labels = token_batch(2, 12)
    for each in (model, whole):
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_a_part_of_a_pipeline_is_sharded_where_it_has_modules():
    """The second half of a model: what it does not hold are identities, and it receives a sequence shard."""
    model = tiny("qwen3")
    whole = copy.deepcopy(model)
    for index in range(2):
        model.model.layers[index] = nn.Identity()
    model.model.embed_tokens = nn.Identity()
    apply_plan(model, axis(), resolve_plan(model, sequence_parallel=True))
    assert model.sequence_shards == 2
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, 32, dtype=torch.float64, requires_grad=True)
    again = hidden.detach().clone().requires_grad_()
    shard = hidden.chunk(2, dim=1)[dist.get_rank()]

    def second_half(each, start, length):
        rotary = each.model.rotary_emb(hidden, torch.arange(12)[None])
        mask = torch.full((12, 12), float("-inf"), dtype=torch.float64).triu(1)[None, None]
        out = start
        for layer in each.model.layers[2:]:
            out = layer(out, attention_mask=mask, position_embeddings=rotary)
        assert out.shape[1] == length
        return each.lm_head(each.model.norm(out))

    logits = second_half(model, shard, 6)
    expected = second_half(whole, again, 12)
    assert_same(logits, expected, 1e-10, "logits")
    logits.square().mean().backward()
    expected.square().mean().backward()
    mine = {n: p.grad for n, p in model.named_parameters()}
    assert_same(mine, {n: p.grad for n, p in whole.named_parameters()}, 1e-10, "gradients")
    assert_same(hidden.grad.chunk(2, 1)[dist.get_rank()], again.grad.chunk(2, 1)[dist.get_rank()], 1e-10)


@pytest.mark.ranks(2)
def test_a_plan_translated_for_adapters_gives_the_same_on_a_model_without_them():
    model = tiny("qwen3")
    whole = copy.deepcopy(model)
    apply_plan(model, axis(), translate_to_lora(resolve_plan(model, sequence_parallel=True)))
    ids, labels = token_batch(2, 12)
    for each in (model, whole):
        next_token_loss(each(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_a_number_stays_in_the_rows_it_belongs_to():
    model = sharded(tiny("llama"), False)
    ids = torch.tensor([[3, 90]])
    (model.model.embed_tokens(ids)[0, 1] * torch.tensor(float("nan"))).sum().backward()
    broken = model.model.embed_tokens.weight.grad.full_tensor().isnan().any(dim=1)
    assert broken.nonzero().tolist() == [[90]]


@pytest.mark.ranks(2)
def test_an_embedding_may_be_called_again_before_its_backward():
    model = sharded(tiny("llama"), False)
    whole = tiny("llama")
    batches = [token_batch(2, 12, seed=seed)[0] for seed in (1, 2)]
    for each in (model, whole):
        outputs = [each.model.embed_tokens(ids) for ids in batches]
        (outputs[0].square().sum() + 2 * outputs[1].square().sum()).backward()
    assert_same(model.model.embed_tokens.weight.grad, whole.model.embed_tokens.weight.grad, 1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, r"num_attention_heads=1 .* \[1\]"),
        (
            {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
            r"num_key_value_heads=3, .* 2 tensor-parallel ranks",
        ),
        ({"vocab_size": 1}, r"1 rows of model\.embed_tokens"),
        ({"intermediate_size": 49}, r"49 output features of model\.layers\.0\.mlp\.gate_proj"),
    ],
)
@pytest.mark.ranks(2)
def test_sizes_that_do_not_divide_are_refused_on_every_rank(settings, words):
    with pytest.raises(ValueError, match=words):
        sharded(tiny("llama", **settings), False)


@pytest.mark.ranks(2)
def test_experts_and_sequences_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"7 experts of model\.layers\.0\.mlp\.experts"):
        sharded(tiny("qwen3_moe", num_experts=7), False)
    model = sharded(tiny("llama"), True)
    with pytest.raises(ValueError, match="11 tokens does not divide over 2 ranks; pad it to 12"):
        model(token_batch(2, 11)[0], use_cache=False)


class TiedUnderAnotherName(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(8, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 8, bias=False, dtype=torch.float64)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        return self.head(self.wte(ids))


@pytest.mark.ranks(2)
def test_a_tie_is_kept_whatever_the_embedding_is_called():
    model, whole = TiedUnderAnotherName(), TiedUnderAnotherName()
    apply_plan(model, axis(), {"wte": VocabParallelEmbedding(), "head": ColwiseParallel(output_layouts=Replicate())})
    for each in (model, whole):
        each(torch.arange(5)[None]).square().sum().backward()
    assert model.head.weight is model.wte.weight
    assert_same(gradients(model), gradients(whole), 1e-12, "gradients")


@pytest.mark.parametrize("of_embedding", [ColwiseParallel(output_layouts=Replicate()), None], ids=["columns", "whole"])
@pytest.mark.ranks(2)
def test_tied_weights_that_would_be_sharded_apart_are_refused(of_embedding):
    plan = {"head": ColwiseParallel(output_layouts=Replicate())}
    plan |= {"wte": of_embedding} if of_embedding else {}
    with pytest.raises(ValueError, match=r"wte\.weight and head\.weight are one parameter"):
        apply_plan(TiedUnderAnotherName(), axis(), plan)


@pytest.mark.ranks(2)
def test_a_style_for_linears_on_a_whole_block_and_a_second_application_are_refused():
    model = tiny("llama", layers=1)
    with pytest.raises(TypeError, match=r"model\.layers\.0\.mlp is a LlamaMLP, but RowwiseParallel is for nn\.Linear"):
        apply_plan(model, axis(), {"model.layers.*.mlp": RowwiseParallel()})
    sharded(model, False)
    with pytest.raises(ValueError, match=r"model\.embed_tokens is sharded already"):
        sharded(model, False)


@pytest.mark.ranks(2)
def test_hooks_on_gradients_from_before_are_refused_before_anything_is_sharded():
    model = tiny("llama", layers=2)
    model.model.layers[1].mlp.down_proj.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight of .* has a hook on its gradient"):
        sharded(model, False)
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.ranks(2)
def test_a_plan_that_leaves_attention_whole_does_not_ask_heads_to_divide_and_is_not_changed():
    model = tiny("llama", layers=1, num_key_value_heads=1)
    style = ColwiseParallel(output_layouts=Replicate())
    style.src_data_rank = None
    apply_plan(model, axis(), {"model.layers.*.mlp.up_proj": style})
    assert style.src_data_rank is None


def test_the_registry_takes_names_classes_and_subclasses():
    from transformers import LlamaForCausalLM, Qwen3Config

    class Mine(LlamaForCausalLM):
        pass

    name = "transformers.models.llama.modeling_llama.LlamaForCausalLM"
    assert PARALLELIZE_FUNCTIONS[name] is PARALLELIZE_FUNCTIONS[LlamaForCausalLM] is PARALLELIZE_FUNCTIONS[Mine]
    assert Mine in PARALLELIZE_FUNCTIONS
    assert Qwen3Config not in PARALLELIZE_FUNCTIONS


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.ranks(2)
def test_attention_weights_of_one_ranks_heads_are_refused(name):
    ids, _ = token_batch(2, 12, vocab_size=60)
    model = tiny("llama") if name == "llama" else small(name)
    plan = resolve_plan(model, infer=True)
    whole = {key: style for key, style in plan.items() if "att" not in key}
    apply_plan(model, axis(), plan)
    with pytest.raises(ValueError, match=r"output_attentions=True of \w+: .* weights of its own heads only"):
        model(ids, output_attentions=True)
    model(ids)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(ids)
    one = tiny("llama") if name == "llama" else small(name)
    expected = one(ids, output_attentions=True).attentions
    found = apply_plan(one, axis(), whole)(ids, output_attentions=True).attentions
    for mine, wanted in zip(found, expected, strict=True):
        assert_same(mine, wanted, 1e-10)


@pytest.mark.ranks(2)
def test_hidden_states_between_sharded_layers_are_refused_and_whole_without_sequence_parallelism():
    ids, _ = token_batch(2, 12)
    for sequence_parallel in (True, False):
        model = tiny("llama")
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        apply_plan(model, axis(), resolve_plan(model, sequence_parallel=sequence_parallel))
        if not sequence_parallel:
            found = model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for mine, wanted in zip(found, expected, strict=True):
                assert_same(mine, wanted, 1e-10)
            continue
        for called in (model, model.model):
            with pytest.raises(
                ValueError, match=r"output_hidden_states=True of Llama.* one rank's part of the sequence"
            ):
                called(ids, output_hidden_states=True, use_cache=False)
        model(ids, use_cache=False)
        model.config.output_hidden_states = True
        with pytest.raises(ValueError, match="output_hidden_states=True"):
            model(ids, use_cache=False)
