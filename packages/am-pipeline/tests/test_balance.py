"""Stages of about equal cost, and the table that says so."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

from am_pipeline import Costs, plan_cut, plan_pipeline
from am_pipeline.__main__ import main
from am_pipeline.cut.anatomy import Anatomy
from am_pipeline.schedule.balance import balanced, costs_of
from am_testkit.models import tiny
from am_testkit.natural import natural_batch, small_with_images

cost = st.integers(0, 20).map(float)


@given(layers=st.lists(cost, min_size=1, max_size=8), before=cost, after=cost, data=st.data())
def test_no_other_cut_has_a_cheaper_costliest_stage(layers, before, after, data):
    stages = data.draw(st.integers(1, len(layers)))
    costs = Costs(before, tuple(layers), after)

    def worst(edges):
        sums = [sum(layers[a:b]) for a, b in itertools.pairwise(edges)]
        sums[0] += before
        sums[-1] += after
        return max(sums)

    ranges = balanced(costs, stages)
    assert [i for r in ranges for i in r] == list(range(len(layers)))
    assert all(len(r) for r in ranges)
    assert len(ranges) == stages
    every = itertools.combinations(range(1, len(layers)), stages - 1)
    best = min(worst((0, *inner, len(layers))) for inner in every)
    assert worst((0, *(r.stop for r in ranges))) == best


def test_a_large_head_makes_the_last_stage_shorter():
    model = tiny("llama", layers=8, vocab_size=800)
    by_flops = plan_cut(model, 2)
    assert len(by_flops.layers_of(0)) > len(by_flops.layers_of(1))
    assert len(plan_cut(model, 2, balance="layers").layers_of(0)) == 4
    assert len(plan_cut(model, 2, balance=Costs(100.0, (1.0,) * 8, 0.0)).layers_of(0)) == 1


def test_costs_count_the_weights_that_a_token_goes_through():
    model = tiny("mixtral", layers=2)
    anatomy = plan_cut(model, 2).anatomy
    costs = costs_of(model, anatomy, "flops")
    layer = model.model.layers[0]
    experts = 3 * 32 * 48 * 2  # two of eight
    attention = sum(p.numel() for p in layer.self_attn.parameters())
    assert costs.layers[0] == 2 * (attention + 32 * 8 + experts)
    assert costs.before == 0, "an embedding is looked up"
    assert costs.after == 2 * 32 * 96
    parameters = costs_of(model, anatomy, "parameters")
    assert parameters.before + sum(parameters.layers) + parameters.after == sum(p.numel() for p in model.parameters())


def test_every_stack_counts_with_its_own_length():
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4}
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, num_decoder_layers=4))
    long_text, long_answer = (
        plan_pipeline(model, 2, "1F1B", microbatches=2, seq_len=seq_len, decoder_seq_len=answer)
        for seq_len, answer in ((512, 16), (16, 512))
    )
    assert len(long_text.cut.layers_of(0)) < len(long_answer.cut.layers_of(0))
    assert long_text.stages[0].flops_share < 0.7
    assert long_answer.stages[1].flops_share < 0.7
    ids = torch.ones(1, 256, dtype=torch.int64)
    example = {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
    by_example = plan_cut(model, 2, example_inputs=example)
    assert by_example.stages == long_text.cut.stages


def test_a_tower_counts_with_its_patches():
    model = small_with_images("qwen2_5_vl")
    batch = natural_batch(model, rows=2)
    plan = plan_cut(model, 2, example_inputs=batch)
    assert plan.anatomy.stacks == ("model.visual.blocks", "model.language_model.layers")
    reading = plan.reading
    flops = reading.flops(reading.form.sizes[0])
    patches, width = batch["pixel_values"].shape[0], 32
    mlp = sum(p.numel() for p in model.model.visual.blocks[0].mlp.parameters() if p.dim() == 2)
    assert flops["model.visual.blocks.0"] >= 2 * patches * (mlp + 4 * width * width)
    assert reading.elements("model.visual.blocks.0", (4, 100, 0, 3 * patches)) == 3 * patches * width
    assert reading.elements("model.language_model.layers.0", (4, 100, 0, 3 * patches)) == 4 * 100 * width


def test_measured_time_is_a_balance_too():
    model = tiny("llama", layers=4, dtype=torch.float32)
    costs = costs_of(model, plan_cut(model, 2).anatomy, "time")
    assert len(costs.layers) == 4
    assert all(seconds > 0 for seconds in (costs.before, *costs.layers, costs.after))
    assert len(plan_cut(model, 2, balance="time").stages) == 2
    with pytest.raises(ValueError, match="meta device"):
        plan_cut(model.to("meta"), 2, balance="time")


def test_wrong_balances_are_refused():
    with pytest.raises(ValueError, match="balance must be one of flops, parameters, time, layers, got 'weight'"):
        plan_cut(tiny("llama"), 2, balance="weight")
    with pytest.raises(ValueError, match="between 1 and the number of layers, 2"):
        balanced(Costs(0, (1, 1), 0), 3)
    assert Anatomy(("layers",), (2,), (), ()).layer(1) == "layers.1"


@pytest.mark.parametrize("lengths", [{"seq_len": 0}, {"seq_len": 8, "decoder_seq_len": -3}])
def test_lengths_below_one_are_refused(lengths):
    with pytest.raises(ValueError, match="at least one token"):
        plan_pipeline(tiny("llama"), 2, "1F1B", microbatches=2, **lengths)


def test_a_plan_is_a_table_before_anything_is_built():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("qwen3", layers=8, tied=True).config)
    plan = plan_pipeline(model, 2, "Interleaved1F1B", microbatches=4, seq_len=128)
    assert [s.rank for s in plan.stages] == [0, 1, 0, 1]
    assert sum(s.flops_share for s in plan.stages) == pytest.approx(1)
    tied = model.lm_head.weight.numel()
    assert sum(s.parameters for s in plan.stages) == sum(p.numel() for p in model.parameters()) + tied
    assert all(s.peak_bytes > 0 for s in plan.stages)
    text = str(plan)
    assert "model.embed_tokens" in text
    assert "idle" in text
    assert "shared: model.embed_tokens.weight (stage 0) = lm_head.weight (stage 3)" in text
    v = plan_pipeline(model, 2, "ZBVZeroBubble", microbatches=4, seq_len=128)
    assert [s.rank for s in v.stages] == [0, 1, 1, 0]


def test_the_command_line_plans_and_draws(tmp_path, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--ranks", "2"]) == 0
    assert "model.layers.0-1  model.embed_tokens" in capsys.readouterr().out
    assert main(["timeline", "--ranks", "2", "--microbatches", "4", "--width", "40"]) == 0
    printed = capsys.readouterr().out
    assert "rank  0  00011......aaaaa222" in printed
    assert "idle 20.0 %" in printed
    assert main(["plan", str(tmp_path / "nothing")]) == 2
    assert "neither a folder with a config.json nor a model type" in capsys.readouterr().err
