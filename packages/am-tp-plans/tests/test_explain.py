"""What `explain` counts without devices is what the ranks do."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_testkit.device import device_type
from am_testkit.heads import inputs_for, small_for
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small, small_config
from am_tp_plans import add_sequence_parallelism, apply_plan, explain_plan, infer_plan, resolve_plan
from am_tp_plans.__main__ import main
from am_tp_plans.explain import sums_a_gradient
from am_tp_plans.fit import check_plan
from am_tp_plans.proof.rehearsal import rehearse

KINDS = {"all_reduce": "all-reduce", "allreduce": "all-reduce", "all_gather": "all-gather", "allgather": "all-gather"}
KINDS |= {"reduce_scatter": "reduce-scatter", "alltoall": "all-to-all", "all_to_all": "all-to-all"}


class Counted(TorchDispatchMode):
    """The collectives that run, by kind and size of the whole tensor."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what DTensor does for it comes here again
        output = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            kind = next(kind for prefix, kind in KINDS.items() if prefix in name)
            tensors = [t for value in (args[:2], output) for t in flattened(value)]
            self.seen[kind, 0 if kind == "all-to-all" else max(t.numel() for t in tensors)] += 1
        return output


def flattened(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flattened(item)


CASES = [(name, sp) for name in ("llama", "qwen3", "gemma3_text", "phi3", "mistral", "glm4", "bert") for sp in (0, 1)]
CASES += [("gpt2", 0), ("gpt2", 1), ("qwen3_moe", 0), ("qwen3_moe", 1), ("deepseek_v3", 0), ("persimmon", 1)]


@pytest.mark.parametrize(("name", "sequence"), CASES)
@pytest.mark.ranks(2)
def test_the_collectives_of_a_step_are_those_that_were_counted_without_devices(name, sequence):
    model = tiny(name) if name in ("llama", "qwen3", "gemma3_text", "phi3", "qwen3_moe") else small(name)
    if name in ("gpt2", "bert", "persimmon"):
        plan = infer_plan(model)
        plan = add_sequence_parallelism(model, plan) if sequence else plan
    else:
        plan = resolve_plan(model, sequence_parallel=bool(sequence))
    found, tokens = rehearse(model, check_plan(model, plan, 2), 2), (2, 8)
    assert found.tokens == 8
    report = explain_plan(model, plan, 2, batch=2, seq_len=8)
    apply_plan(model, init_device_mesh(device_type(), (2,)), plan)
    assert report.held == sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    ids, labels = token_batch(*tokens, vocab_size=60)
    with Counted() as forward:
        loss = next_token_loss(model(ids, use_cache=False).logits, labels)
    with Counted() as backward:
        loss.backward()
    for phase, counted in (("forward", forward), ("backward", backward)):
        traffic = [c for c in found.traffic if c.phase == phase]
        expected = Counter(
            (c.kind, 0 if c.kind == "all-to-all" else c.elements) for c in traffic if not sums_a_gradient(c)
        )
        if together := sum(c.elements for c in traffic if sums_a_gradient(c)):
            expected["all-reduce", together] += 1
        assert counted.seen == expected, phase
    dist.barrier()


def test_a_report_adds_up_and_grows_with_the_tokens():
    model = tiny("llama", dtype=torch.bfloat16, num_key_value_heads=4)
    plan = resolve_plan(model, sequence_parallel=True)
    once, twice = (explain_plan(model, plan, 4, batch=1, seq_len=n) for n in (16, 32))
    layers = [row for row in once.rows if row.key.startswith("model.layers.*")]
    assert sum(row.parameters for row in once.rows) == once.held
    assert once.layer_bytes[0] == sum(row.forward for row in layers) / 4
    assert once.layer_bytes[0] == 4 * 0.75 * 16 * 32 * 2, "two gathers and two scatters of (1, 16, 32) in bfloat16"
    assert twice.layer_bytes[0] == 2 * once.layer_bytes[0]
    assert twice.hidden_bytes == 2 * once.hidden_bytes == 2 * 16 * 32 * 2 // 4
    assert once.whole == {
        "model.layers.*.input_layernorm.weight": 128,
        "model.layers.*.post_attention_layernorm.weight": 128,
        "model.norm.weight": 32,
    }
    assert {row.source for row in once.rows} == {"family llama"}
    with pytest.raises(ValueError, match="num_attention_heads=4 does not divide over 8"):
        explain_plan(model, plan, 8)
    with pytest.raises(ValueError, match="seq_len=0 must be positive"):
        explain_plan(model, plan, 4, seq_len=0)


def test_the_command_prints_a_table_and_says_what_is_wrong(tmp_path, capsys):
    for name in ("mistral", "gpt2"):
        small_config(name, layers=2).save_pretrained(tmp_path / name)
    assert main(["explain", str(tmp_path / "mistral"), "--tp", "2", "--sp", "--seq-len", "128"]) == 0
    table = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in table
    assert "transformers" in table
    assert "rehearsal" in table
    assert main(["explain", str(tmp_path / "gpt2"), "--tp", "4", "--infer"]) == 0
    assert "PackedColwise" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "gpt2"), "--tp", "4"]) == 2
    assert "infer_plan may find one" in capsys.readouterr().err
    assert main(["explain", "nothing-of-the-kind", "--tp", "2"]) == 2
    assert "neither a folder with a config.json nor a model type" in capsys.readouterr().err


def test_a_tower_without_an_embedding_of_ids_is_explained_and_run_with_numbers():
    model = small_for("image", "clip")
    inputs = inputs_for(model, "image", 2)
    plan = infer_plan(model, example_inputs=inputs)
    assert explain_plan(model, plan, 2, example_inputs=inputs).numbers.error < 1e-10
