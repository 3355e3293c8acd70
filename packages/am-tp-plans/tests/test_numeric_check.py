"""A plan is run with numbers before it is handed out: right ones agree, wrong ones that the rules miss are refused."""

from __future__ import annotations

import random
import re
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from am_testkit.device import device_type
from am_testkit.models import tiny
from am_testkit.zoo import small
from am_tp_plans import (
    PackedColwiseParallel,
    ReplicatedWithGradAllReduce,
    SequenceGatherOutput,
    SharedInput,
    add_sequence_parallelism,
    expand_plan,
    explain_plan,
    get_hf_tp_shard_plan,
    infer_plan,
    resolve_plan,
)
from am_tp_plans.fit import check_plan
from am_tp_plans.proof import numeric_check
from am_tp_plans.proof.numeric_check import check_numbers
from am_tp_plans.proof.rehearsal import rehearse
from am_tp_plans.proof.twin import make_twin
from am_tp_plans.sources import infer, translate
from am_tp_plans.styles.around import change_output
from am_tp_plans.styles.basic import each
from am_tp_styles import RowwiseParallelLora
from am_tp_styles.communication import gather
from am_tp_styles.local_parameters import local


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_is_compared_are_numbers(name, monkeypatch):
    """A NaN equals a NaN, so nothing would be compared where everything is one."""
    seen, worst = [], numeric_check._worst
    monkeypatch.setattr(numeric_check, "_worst", lambda run, share: seen.append(run) or worst(run, share))
    get_hf_tp_shard_plan(small(name, attention="eager", vocab_size=63))
    assert {run.attention for run in seen} == {"eager", "sdpa"}
    assert any("padding" in run.condition for run in seen)
    for run in seen:
        for tensor in (*run.outputs.values(), *run.gradients.values()):
            assert tensor is None or tensor.isfinite().all(), run.condition


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["mistral", "gpt2", "bert", "persimmon"])
def test_a_right_plan_agrees_with_one_process(name, ranks, sequence):
    model = small(name, attention=None, **({"num_key_value_heads": 4} if name == "mistral" else {}))
    plan = get_hf_tp_shard_plan(model) if name == "mistral" else infer_plan(model, ranks)
    plan = add_sequence_parallelism(model, plan, ranks) if sequence else plan
    found = check_numbers(model, plan, ranks)
    assert found.error is not None
    assert found.error < 1e-9
    assert found.ranks == ranks
    alone, more = found.conditions
    assert alone == "ids alone under sdpa"
    assert more == ("padding, labels under sdpa" if sequence else "padding, hidden states, labels under sdpa")


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "ministral3", "phi3"])
def test_plans_written_by_hand_agree_with_one_process(name, sequence):
    model = tiny(name)
    found = check_numbers(model, resolve_plan(model, sequence_parallel=sequence), 2)
    assert found.error is not None, found
    assert found.error < 1e-6, found
    assert [condition.rpartition(" ")[2] for condition in found.conditions] == ["eager", "eager", "sdpa"]
    assert found.left_out == (("model.embed_tokens",) if name == "gemma3_text" else ())


class ForgetsItsSum(RowwiseParallelLora):
    def attach(self, module, axis):
        super().attach(module, axis)
        module.edges = type(module.edges)(axis, "sequence", Replicate(), Replicate())
        module.edges = type(module.edges)(axis, "row", Shard(-1), Shard(-1))
        module.__class__ = type("Unsummed", (type(module),), {"forward": _without_sum})


def _without_sum(self, x):
    return nn.functional.linear(x, local(self.weight))


class WrongHeads(PackedColwiseParallel):
    """Takes every second row of a projection: half of each head instead of half of the heads."""

    def __init__(self):
        super().__init__(1)

    def attach(self, module, axis):
        super().attach(module, axis)
        module.axis = axis
        module.__class__ = type("EverySecond", (type(module),), {"forward": _every_second})


def _every_second(self, x):
    whole = gather(local(self.weight), self.axis, 0)
    return nn.functional.linear(x, whole[self.axis.rank :: self.axis.size])


class ForgetsGradients(ReplicatedWithGradAllReduce):
    def attach(self, module, axis):
        pass


class GathersInAnotherOrder(SequenceGatherOutput):
    def attach(self, module, axis):
        super().attach(module, axis)
        change_output(module, partial(torch.roll, shifts=1, dims=1))


class Fails(SharedInput):
    def attach(self, module, axis):
        change_output(module, partial(_only_on_the_second, axis))


class OneMoreExchange(SharedInput):
    def attach(self, module, axis):
        change_output(module, partial(_summed_on_the_second, axis))


def _only_on_the_second(axis, hidden):
    return hidden if axis.rank == 0 else hidden.view(-1, 7)


def _summed_on_the_second(axis, hidden):
    return hidden if axis.rank == 0 else hidden + axis.all_reduce(hidden.detach()) * 0


LAYER = "model.layers.*"
WRONG = {
    f"{LAYER}.mlp.down_proj": (ForgetsItsSum, r"is off by .* leave .* out, or pass a plan of your own"),
    f"{LAYER}.self_attn.v_proj": (WrongHeads, r"\(ids alone under sdpa\), .* is off by"),
    f"{LAYER}.self_attn.q_norm": (ForgetsGradients, r"the gradient of model.layers.\d.self_attn.q_norm.weight is off"),
    f"{LAYER}.mlp": (Fails, r"it works in one process, and on one of 2 simulated ranks it fails with RuntimeError"),
    f"{LAYER}.self_attn": (OneMoreExchange, "on 2 simulated ranks rank . exchanges the"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_style_that_the_rules_take_at_its_word_is_refused_by_numbers(key):
    model = small("qwen3", attention=None)
    plan = get_hf_tp_shard_plan(model)
    style, words = WRONG[key]
    wrong = plan | {key: style()}
    assert key in plan
    rehearse(model, check_plan(model, wrong, 2), 2)
    for function in (check_numbers, explain_plan):
        with pytest.raises(ValueError, match=f"the plan does not fit Qwen3ForCausalLM: .*{words}"):
            function(model, wrong, 2)
    assert check_numbers(model, plan, 2).error < 1e-9


def test_a_sequence_gathered_in_another_order_is_refused():
    model = small("gpt2", attention=None)
    plan = add_sequence_parallelism(model, infer_plan(model))
    (exit_,) = [key for key, style in plan.items() if isinstance(style, SequenceGatherOutput)]
    rehearse(model, expand_plan(model, plan), 2)
    with pytest.raises(ValueError, match="is off by"):
        check_numbers(model, plan | {exit_: GathersInAnotherOrder()}, 2)


def test_whatever_hands_out_a_plan_refuses_it_when_its_numbers_are_wrong(monkeypatch):
    model = small("mistral", attention=None)
    plan = get_hf_tp_shard_plan(model)
    monkeypatch.setitem(translate._STYLES, "rowwise", ForgetsItsSum)
    with pytest.raises(ValueError, match=r"MistralForCausalLM: run with numbers .* is off by"):
        get_hf_tp_shard_plan(small("mistral", attention=None))
    monkeypatch.setattr(infer, "RowwiseParallel", ForgetsItsSum)
    with pytest.raises(ValueError, match=r"OPTForCausalLM: run with numbers .* is off by"):
        infer_plan(small("opt", attention=None))
    wrong = plan | {"model.layers.*.mlp.down_proj": ForgetsItsSum()}
    with pytest.raises(ValueError, match="MistralForCausalLM: run with numbers"):
        add_sequence_parallelism(model, wrong)


LARGE = {"llama": 8, "gpt2": 4, "qwen3_moe": 4, "gemma3_text": 4, "phi3": 2}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_on_meta_has_a_small_twin(name):
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[name]())
        size = sum(p.numel() for p in model.parameters())
        assert size > 100_000_000
        plan = infer_plan(model, LARGE[name]) if name == "gpt2" else resolve_plan(model)
        found = check_numbers(model, plan, LARGE[name])
    assert found.error is not None, found
    assert found.error < 1e-5
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_twin_of_a_large_model_has_its_first_its_last_and_every_kind_of_layer():
    import transformers

    with torch.device("meta"):
        config = transformers.Qwen3MoeConfig(num_hidden_layers=6, mlp_only_layers=[2], vocab_size=50_001)
        model = transformers.Qwen3MoeForCausalLM(config)
    plan = add_sequence_parallelism(model, get_hf_tp_shard_plan(model))
    concrete = expand_plan(model, plan)
    twin = make_twin(model, concrete, 2)
    layers = twin.model.model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [True, True, False, True]
    (last,) = [n for n, style in concrete.items() if any(isinstance(p, SequenceGatherOutput) for p in each(style))]
    assert last == "model.layers.5"
    assert type(twin.plan["model.layers.3"]) is type(concrete[last])
    assert twin.model.config.vocab_size == 97, "odd, as the model's: its rows do not divide either"
    assert sum(parameter.numel() for parameter in twin.model.parameters()) < 4_000_000


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.embed(ids))))


TOY_PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def test_a_model_without_a_config_is_copied_without_its_hooks():
    model, calls = Toy(), []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    assert check_numbers(model, TOY_PLAN, 2).error < 1e-9
    assert check_numbers(model, TOY_PLAN, 3).error < 1e-9
    assert not calls
    with pytest.raises(ValueError, match=r"the plan does not fit Toy: .* fails with RuntimeError"):
        check_numbers(model, {"up": ColwiseParallel()}, 2)


def meta_toy():
    with torch.device("meta"):
        return Toy()


def patched():
    model = small("mistral", attention=None)
    model.model.layers[0].forward = model.model.layers[0].forward
    return model


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 250_000), nn.Linear(250_000, 8)


@pytest.mark.parametrize(
    ("make", "plan", "words"),
    [
        (meta_toy, TOY_PLAN, "Toy has no config to build a small one from"),
        (Wide, TOY_PLAN, "Wide has no config to build a small one from"),
        (
            lambda: small("falcon"),
            {"transformer.h.*.mlp.dense_h_to_4h": ColwiseParallel()},
            "ColwiseParallel computes on DTensors in transformer.h.0.mlp.dense_h_to_4h, a FalconLinear",
        ),
        (Toy, TOY_PLAN | {"down": RowwiseParallel(use_local_output=False)}, "need DTensors"),
        (Toy, {"down": RowwiseParallel()}, "the 12 input features of down do not divide over 5 ranks"),
    ],
)
def test_what_cannot_be_run_says_why(make, plan, words):
    found = check_numbers(make(), plan, 5 if "divide" in words else 2)
    assert found.error is None
    assert re.search(words, found.why_not), found.why_not
    assert str(found) == f"not run with numbers: {found.why_not}"


def test_a_large_model_that_was_changed_after_it_was_built_is_not_run():
    import transformers

    with torch.device("meta"):
        models = [transformers.LlamaForCausalLM(transformers.LlamaConfig()) for _ in range(3)]
        models[0].model.layers[3].mlp.gate_proj = nn.Sequential(models[0].model.layers[3].mlp.gate_proj)
        models[1].lm_head.forward = lambda hidden: hidden
        models[2].model.layers[0].self_attn.norm = nn.LayerNorm(4096)
    plan = {"model.layers.*.mlp.up_proj": ColwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    for model, words in zip(
        models, ("one of every kind|is another model", "a forward put on itself", "other modules in"), strict=True
    ):
        found = check_numbers(model, plan, 2)
        assert re.search(words, found.why_not), found.why_not


def test_nothing_of_the_caller_changes():
    model = small("qwen3", attention=None, dtype=torch.float32).train()
    plan, calls = get_hf_tp_shard_plan(model), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    weights = {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    classes, config = [type(module) for module in model.modules()], model.config.to_json_string(use_diff=False)
    torch.manual_seed(3)
    random.seed(3)
    state, python = torch.get_rng_state(), random.getstate()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad(), torch.device("meta"), torch.autocast(device_type()):
            found = check_numbers(model, plan | {"model.norm": ReplicatedWithGradAllReduce([])}, 2)
            assert torch.ones(1).is_meta
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.error < 1e-9
    assert torch.get_rng_state().equal(state)
    assert random.getstate() == python
    assert not calls
    assert all(len(module._forward_hooks) == 1 for module in model.modules())
    for name, parameter in model.named_parameters():
        identity, value, trained = weights[name]
        assert (id(parameter), parameter.requires_grad) == (identity, trained)
        assert parameter.equal(value)
        assert parameter.grad is None
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_json_string(use_diff=False) == config
    assert model.training


def test_what_was_found_is_kept_by_class_config_and_plan():
    model, same, other = (small("mistral", attention=None, intermediate_size=size) for size in (48, 48, 64))
    plan = get_hf_tp_shard_plan(model)
    found = check_numbers(model, plan, 2)
    assert check_numbers(same, get_hf_tp_shard_plan(same), 2) is found
    assert check_numbers(other, plan, 2) is not found
    assert check_numbers(model, plan, 1) is not found
    same.set_attn_implementation("eager")
    assert check_numbers(same, plan, 2).conditions != found.conditions


def test_several_threads_may_ask_at_once():
    found = {}

    def ask(name):
        found[name] = check_numbers(*models[name], 2)

    models = {name: small(name, attention=None, intermediate_size=56) for name in ("mistral", "qwen2", "llama")}
    models = {name: (model, get_hf_tp_shard_plan(model)) for name, model in models.items()}
    numeric_check._known.clear()
    threads = [threading.Thread(target=ask, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(check.error < 1e-9 for check in found.values())
    assert len(found) == 3


def test_explain_tells_it():
    model = small("gpt2", attention=None)
    report = explain_plan(model, infer_plan(model), 2)
    assert "proven by rules; run with numbers on 2 simulated ranks: largest error" in str(report)
    report = explain_plan(small("falcon"), infer_plan(small("falcon")), 2)
    assert "proven by rules; not run with numbers: ColwiseParallel computes on DTensors" in str(report)


def test_adapters_are_run_with_the_model_that_has_them():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj"], use_dora=True)
    model = get_peft_model(small("mistral", attention=None), config).get_base_model()
    found = check_numbers(model, get_hf_tp_shard_plan(model), 2)
    assert found.error is not None, found
    assert found.error < 1e-9
