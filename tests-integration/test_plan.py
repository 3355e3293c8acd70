"""`docs/examples/plan.py`: what a layout is said to take is what it takes, and no other is faster."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

import plan as program
from planning.costs import EXPERTS, REST, Work, count_costs
from planning.layouts import Job, Layout, axes, microbatch_sizes
from planning.machine import MACHINES, Link, load, quantity, save
from planning.memory import memory_of
from planning.model import of_model, plan_for
from planning.search import Tracer, expanded, peak_of, search
from planning.step import Clock, stages_of

from am_fsdp._torch_compat import init_fake_process_group
from am_fsdp.ledger import Ledger
from training.layout import lay_out
from training.model import build_optimizer

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="needs no ranks: runs once, with the two-rank suite"
)
H100 = MACHINES["h100"]
GIB = 2**30
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
    "head_dim": 32,
}
LATENT = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "qk_head_dim": 48,
}


def model_of(family, sizes, **more):
    config = AutoConfig.for_model(family, use_cache=False, **sizes | more)
    with torch.device("meta"):
        return of_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), family)


@pytest.fixture(scope="module")
def llama():
    return small_llama()


@pytest.fixture(scope="module")
def mixture():
    return model_of("deepseek_v3", LATENT)


def test_products_and_attention_of_a_layer_are_those_of_its_shapes(llama):
    part = count_costs(llama, seq_len=128).parts[0]
    weights = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 704
    products = sum(w.flops * n for w, n in part.forward.work.items() if w.kind == "product")
    attention = sum(w.flops * n for w, n in part.forward.work.items() if w.kind == "attention")
    assert products == 2 * 128 * weights
    assert attention == 4 * 8 * 32 * 128 * 128 / 2  # the causal half
    backward = sum(w.flops * n for w, n in part.backward.work.items() if w.kind == "product")
    assert backward == 2 * products
    again = count_costs(llama, seq_len=128, recompute="full").parts[0]
    last = 2 * 128 * 256 * 704  # the product behind which nothing is needed is not done again
    assert again.backward.flops == part.backward.flops + part.forward.flops - last
    assert again.kept < part.kept / 5


def test_tensor_ranks_share_products_and_exchange_hidden_states(llama):
    whole, half = (count_costs(llama, seq_len=128, tp=tp) for tp in (1, 2))
    assert half.parts[0].forward.flops == pytest.approx(whole.parts[0].forward.flops / 2)
    assert half.parts[0].parameters == pytest.approx(whole.parts[0].parameters / 2, rel=0.01)
    assert dict(half.parts[0].forward.messages) == {("all_reduce", 2 * 128 * 256): 2}
    parts = count_costs(llama, seq_len=128, tp=2, sequence_parallel=True)
    assert {kind for kind, _ in parts.parts[0].forward.messages} == {"all_gather", "reduce_scatter"}
    assert parts.hidden == half.hidden / 2


def test_experts_are_counted_apart_and_attention_with_narrow_values_stays_one_kernel(mixture):
    assert mixture.kinds == (0, 0, 1, 1, 1, 1)
    costs = count_costs(mixture, seq_len=128)
    assert EXPERTS not in costs.parts
    experts = costs.parts[EXPERTS + 1]
    grouped = sum(w.flops * n for w, n in experts.forward.work.items() if w.kind == "grouped")
    assert grouped == 2 * 128 * 2 * 3 * 256 * 64  # two experts for a token
    assert experts.parameters == 8 * 3 * 256 * 64
    for kind in (0, 1):
        assert sum(n for w, n in costs.parts[kind].forward.work.items() if w.kind == "attention") == 1


def test_frozen_weights_get_no_gradients(llama):
    adapters = plan_for("llama", lora=8)
    part = count_costs(adapters, seq_len=32).parts[0]
    assert 0 < part.trained < part.parameters / 50
    assert adapters.parameters > llama.parameters


PEAKS = {
    "sharded": (Layout(dp_shard=4), 4),
    "several microbatches": (Layout(dp_shard=4), 16),
    "recomputed": (Layout(dp_shard=4, recompute="full"), 4),
    "tensor": (Layout(dp_shard=2, tp=2), 8),
    "sequence": (Layout(dp_shard=2, tp=2, sequence_parallel=True, recompute="full"), 8),
    "replicas": (Layout(dp_replicate=2, dp_shard=2, microbatch=2), 8),
}


@pytest.mark.parametrize("name", PEAKS)
def test_the_composed_peak_is_that_of_the_real_layout_on_fake_ranks(name):
    layout, batch = PEAKS[name]
    job, sizes = Job(layout.world, 8, batch, 256), LLAMA | {"num_hidden_layers": 4}
    four = model_of("llama", sizes)
    planned = peak_of(Clock(four, H100, job), Tracer(four, job).costs(layout), layout)
    assert planned.peak == pytest.approx(ledger_peak("llama", sizes, layout, batch, 256), rel=0.1)


def ledger_peak(family, sizes, layout, batch, length):
    """The peak of the second step of a real layout, with fake tensors on fake ranks."""
    init_fake_process_group(layout.world)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        meshes = layout.meshes("cpu")
        config = AutoConfig.for_model(family, use_cache=False, **sizes)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        made = lay_out(
            model,
            layout,
            meshes,
            schedule=layout.schedule,
            microbatch=layout.microbatch,
            local_batch=batch // layout.dp,
            device=torch.device("cpu"),
            mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32),
            recompute=layout.recompute or False,
        )
        ledger = Ledger(meshes[0])
        with fake, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for part in made.parts:
                part.to_empty(device="cpu")
            optimizers = [build_optimizer(part, 1e-3) for part in made.parts]
            held = [t for part in made.parts for t in (*part.parameters(), *part.buffers())]
            ledger.hold(*(t.to_local() if isinstance(t, DTensor) else t for t in held))
            ids = torch.zeros(batch // layout.dp, length, dtype=torch.int64)
            with ledger:
                for _ in range(2):
                    ledger.peak = 0
                    made.step(ids, ids)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
        return ledger.peak
    finally:
        dist.destroy_process_group()


def test_a_pipeline_rank_holds_its_stages_and_the_microbatches_on_their_way(llama):
    job = Job(4, 8, 16, 128)
    layout = Layout(pp=4)
    clock = Clock(llama, H100, job)
    first, last = (clock.held(layout, rank, layout.microbatches(job)) for rank in (0, 3))
    assert (first.first, first.last, last.first, last.last) == (True, False, False, True)
    assert (first.live, last.live) == (4, 1)
    assert sum(sum(stage.values()) for stage in stages_of(llama, 4)) == 8
    costs = Tracer(llama, job).costs(layout)
    more = memory_of(costs, layout, dataclasses.replace(first, live=8), 16, 2)
    assert more.activations > memory_of(costs, layout, first, 16, 2).activations


def test_an_unequal_pipeline_idles_and_its_events_cover_the_step(llama):
    job = Job(4, 8, 16, 128)
    clock, tracer = Clock(llama, H100, job), Tracer(llama, job)
    for schedule in ("1F1B", "Interleaved1F1B", "ZBVZeroBubble"):
        layout = Layout(pp=4, schedule=schedule)
        time = clock.time(tracer.costs(layout), layout)
        assert 0 < time.bubble < 1
        assert max(e.end for e in time.events) <= time.seconds
        assert time.seconds >= clock.floor(tracer.costs(layout), layout) * (1 - 1e-9)


@pytest.mark.parametrize(("family", "sizes"), [("llama", LLAMA), ("deepseek_v3", LATENT)])
def test_more_memory_never_makes_the_best_layout_slower(family, sizes):
    planned, job = model_of(family, sizes), Job(4, 2, 16, 256)
    tracer, seconds = Tracer(planned, job), []
    for memory in (60 * 2**20, 100 * 2**20, 200 * 2**20, GIB):
        result = search(planned, H100, job, memory=memory, tracer=tracer)
        assert all(found.memory.peak <= memory for found in result.found)
        seconds.append(result.found[0].time.seconds if result.found else float("inf"))
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < float("inf")


def test_the_search_finds_what_trying_every_layout_finds(llama):
    job, memory = Job(4, 4, 16, 256), 150 * 2**20
    clock, tracer = Clock(llama, H100, job), Tracer(llama, job)
    every = []
    for division in axes(job, 8, 0, most_tp=4, most_cp=1):
        division.check(4, llama.config, job.batch, 1, job.seq_len)
        for layout in expanded(division, job, 8):
            costs = tracer.costs(layout)
            if peak_of(clock, costs, layout).peak <= memory:
                every.append(clock.time(costs, layout).seconds)
    found = search(llama, H100, job, memory=memory, tracer=tracer).found
    assert found[0].time.seconds == pytest.approx(min(every))
    assert len(found) > 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 6), st.sampled_from([1, 2]), st.sampled_from(["", "full"]), st.sampled_from([1, 2, 4]))
def test_a_step_takes_longer_and_more_with_more_tokens(power, tp, recompute, microbatch):
    layout = Layout(dp_shard=2, tp=tp, recompute=recompute, microbatch=microbatch)
    costs = traced(layout)
    jobs = [Job(2 * tp, 8, 8 << shift, 128) for shift in (power, power + 1)]
    times = [Clock(small_llama(), H100, job).time(costs, layout).seconds for job in jobs]
    assert times[0] < times[1]
    peaks = [peak_of(Clock(small_llama(), H100, job), costs, layout).peak for job in jobs]
    assert peaks[0] <= peaks[1]


@functools.cache
def small_llama():
    return model_of("llama", LLAMA)


@functools.cache
def traced(layout):
    return Tracer(small_llama(), Job(layout.world, 8, 8, 128)).costs(layout)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(0, 2))
def test_which_node_is_which_changes_nothing(nodes, tp, cp):
    """Links depend on how many ranks of an axis are on one node, the same for each of its groups."""
    per_node, tp, cp = 8, 2**tp, 2**cp
    world = per_node << nodes
    shard = world // (tp * cp)
    clock = Clock(small_llama(), H100, Job(world, per_node, 64, 128))
    names = torch.randperm(world // per_node)
    mesh = torch.arange(world).view(shard, cp, tp)
    for axis, (stride, size) in enumerate([(tp * cp, shard), (tp, cp), (1, tp)]):
        for group in mesh.movedim(axis, -1).reshape(-1, size):
            on_nodes = torch.bincount(names[group // per_node])
            assert set(on_nodes[on_nodes > 0].tolist()) == {clock._neighbours(stride, size)}


@settings(deadline=None, max_examples=25)
@given(st.floats(1e3, 1e10), st.sampled_from([2, 4, 8, 16, 64, 512]), st.sampled_from(["all_gather", "all_reduce"]))
def test_messages_take_longer_with_bytes_ranks_and_slower_links(size, ranks, kind):
    inside = H100.message(kind, size, ranks, ranks)
    across = H100.message(kind, size, ranks, 1)
    assert 0 < inside <= across
    assert H100.message(kind, 2 * size, ranks, ranks) > inside
    assert H100.message(kind, size, 2 * ranks, 2 * ranks) > inside
    assert H100.message(kind, size, 1, 1) == 0


@settings(deadline=None, max_examples=25)
@given(st.floats(0, 1e15), st.floats(1.0, 100.0))
def test_a_kernel_takes_longer_with_more_to_do(flops, factor):
    for kind in ("product", "attention", "grouped", "element-wise"):
        some, more = Work(kind, flops, flops), Work(kind, flops * factor, flops * factor)
        assert H100.seconds(more) >= H100.seconds(some) * (1 - 1e-9)


def test_every_division_uses_all_ranks_once():
    job = Job(16, 8, 32, 4096)
    found = list(axes(job, 8, 8, most_tp=8, most_cp=4))
    assert len(found) == len(set(found))
    for layout in found:
        assert layout.world == 16
        assert layout.tp <= 8
        layout.check(16, None if layout.ep == 1 else EightExperts, job.batch, 1, job.seq_len)
    assert microbatch_sizes(12) == [1, 2, 4]


class EightExperts:
    model_type, num_experts = "some", 8


def test_the_program_prints_ten_and_the_line_that_starts_the_first(tmp_path, capsys):
    AutoConfig.for_model("llama", **LLAMA | {"num_hidden_layers": 4}).save_pretrained(tmp_path)
    asked = [str(tmp_path), "--gpus", "4", "--memory", "1GiB", "--batch-tokens", "16K", "--seq-len", "1024"]
    assert program.main([*asked, "--explain", "1", "--picture", str(tmp_path / "step.png")]) == 0
    shown = capsys.readouterr().out
    assert "1 before 2: " in shown
    assert f"torchrun --standalone --nproc-per-node 4 docs/examples/train.py --config {tmp_path} --pp " in shown
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert program.main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    best = told["layouts"][0]
    assert best["pp"] * best["dp_replicate"] * best["dp_shard"] * best["cp"] * best["tp"] == 4
    assert best["peak"] <= GIB
    assert [layout["seconds"] for layout in told["layouts"]] == sorted(layout["seconds"] for layout in told["layouts"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["no-such-model"], "neither a folder"),
        (["llama", "--links", "fast"], "--links 'fast' must be two bandwidths"),
        (["llama", "--links", "1GB/s,slow"], "--links 'slow' is no number"),
        (["llama", "--machine", "abacus"], "neither a file of --calibrate nor one of h100"),
        (["llama", "--batch-tokens", "1K", "--seq-len", "2048"], "less than one sequence"),
        (["llama", "--gpus", "12"], "must be a multiple of --gpus-per-node 8"),
        (["llama", "--memory", "many"], "--memory 'many' is no number"),
        (["llama", "--gpus", "2", "--memory", "8GiB"], "weights, gradients and optimizer alone take 50.2 GiB"),
        (
            ["llama", "--gpus", "8", "--memory", "13GiB", "--batch-tokens", "32K", "--gpus-per-node", "1"],
            "the smallest is",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_would(words, why, capsys):
    assert program.main(words) == 2
    assert why in capsys.readouterr().err


def test_heads_experts_and_batches_that_do_not_divide_are_left_out_by_name():
    planned = model_of("llama", LLAMA, hidden_size=192, num_attention_heads=6, num_key_value_heads=3)
    result = search(planned, H100, Job(4, 8, 8, 256), memory=GIB)
    assert {found.layout.tp for found in result.found} <= {1, 2}
    assert any("--tp 4 does not fit num_attention_heads=6" in why for why in result.refused)
    layouts = list(axes(Job(4, 8, 6, 256), 8, 0, most_tp=4, most_cp=1))
    assert all(6 % layout.dp == 0 for layout in layouts)
    assert all(layout.ep in (1, 2) for layout in axes(Job(8, 8, 8, 256), 8, 6, most_tp=1, most_cp=1))


def test_a_function_of_the_users_is_planned(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, hidden):
            return hidden + self.down(self.up(hidden).relu())

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
            self.layers = nn.ModuleList(Block() for _ in range(4))

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return self.head(hidden)

    with torch.device("meta"):
        planned = of_model(Mine(), "mine:build")
    costs = count_costs(planned, seq_len=8)
    assert costs.parts[0].forward.flops == 2 * 2 * 8 * 16 * 32
    assert costs.parts[REST].parameters == 50 * 16 + 16 * 50 + 50


def test_a_machine_is_read_as_it_was_written(tmp_path):
    machine = dataclasses.replace(H100, inside=Link(1e9, 1e-6))
    save(machine, tmp_path / "machine.json")
    assert load(str(tmp_path / "machine.json")) == machine
    assert machine.with_links("450GB/s,50GB/s").across.bandwidth == 50e9
    assert quantity("80GiB", "") == 80 * GIB
    assert quantity("4M", "") == 4e6
