"""What only a GPU can show; `nox -s gpu` runs it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import (
    HAVE_NVFSDP,
    fsdp2_strategy_parallelize,
    load_hf_weights,
    nvfsdp_strategy_parallelize,
    save_hf_weights,
)
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
AXES = ("data_parallel", "tensor_parallel")


def optimizer_of(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01)


def logits_of_three_steps(model, optimizer, ids, labels):
    seen = []
    for _ in range(3):
        logits = model(ids, use_cache=False).logits
        seen.append(logits.detach().clone())
        next_token_loss(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(seen)


@pytest.mark.skipif(not HAVE_NVFSDP, reason="needs megatron-fsdp")
@pytest.mark.parametrize("strategy", ["no_shard", "optim", "optim_grads", "optim_grads_params"])
@pytest.mark.ranks(1, timeout=300)
def test_nvfsdp_trains_as_fsdp2_does(strategy):
    torch.backends.cuda.matmul.allow_tf32 = False
    ours = tiny("llama").float().cuda()
    theirs, whole = copy.deepcopy(ours), copy.deepcopy(ours)
    mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=AXES)
    ids, labels = (t.cuda() for t in token_batch(4, 8, vocab_size=60))
    expected = logits_of_three_steps(whole, optimizer_of(whole), ids, labels)

    fsdp2_strategy_parallelize(theirs, mesh, torch.float32)
    assert_same(logits_of_three_steps(theirs, optimizer_of(theirs), ids, labels), expected, 1e-5, "FSDP2")

    sharded, optimizer = nvfsdp_strategy_parallelize(
        ours,
        mesh,
        optimizer_of(ours),
        nvfsdp_unit_modules=["LlamaDecoderLayer"],
        data_parallel_sharding_strategy=strategy,
        preserve_fp32_weights=True,
        grad_reduce_in_fp32=True,
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert_same(logits_of_three_steps(sharded, optimizer, ids, labels), expected, 1e-5, "nvFSDP")


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("mode", [False, "full", "selective", "mlp"])
@pytest.mark.ranks(1, timeout=120)
def test_recomputed_and_offloaded_steps_are_exact(mode, offloaded):
    model = tiny("qwen3", tied=True, attention="sdpa")
    one = copy.deepcopy(model).cuda()
    model = model if offloaded else model.cuda()
    ids, labels = (t.cuda() for t in token_batch(4, 16))
    mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=AXES)
    how = {"activation_checkpointing": mode, "cpu_offload": offloaded}
    fsdp2_strategy_parallelize(model, mesh, torch.float64, **how)
    steps = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, one)]
    for _ in range(3):
        results = [m(ids, use_cache=False).logits for m in (model, one)]
        assert_same(*results, 1e-6, "logits")  # its rotary embeddings and norms are computed in float32
        for logits, step in zip(results, steps, strict=True):
            step.zero_grad()
            next_token_loss(logits, labels).backward()
            step.step()
        expected = {name: gradient.to(model_device(model)) for name, gradient in gradients(one).items()}
        assert_same(gradients(model), expected, 1e-6, "gradients")
    assert model_device(model) == ("cpu" if offloaded else "cuda")


def model_device(model):
    return next(model.parameters()).device.type


@pytest.mark.ranks(1, timeout=120)
def test_a_folder_is_read_onto_the_gpu_and_written_from_it(tmp_path):
    one = tiny("qwen3_moe").cpu()
    one.save_pretrained(tmp_path / "read")
    with torch.device("meta"):
        model = type(one)._from_config(one.config, dtype=one.dtype)
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=AXES[:1])
    fsdp2_strategy_parallelize(model, mesh, one.dtype)
    load_hf_weights(model, tmp_path / "read")
    assert model_device(model) == "cuda"
    for name, parameter in model.named_parameters():
        assert whole(parameter).cpu().equal(one.get_parameter(name)), name
    save_hf_weights(model, tmp_path / "written")
    again = type(one).from_pretrained(tmp_path / "written", dtype=one.dtype).cpu()
    for name, parameter in again.named_parameters():
        assert parameter.equal(one.get_parameter(name)), name


SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8,
         "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 1024, "layers": 6}  # fmt: skip
SCRIPT = """
import json, sys, torch
from am_fsdp.preflight import preflight
from am_testkit.models import tiny
sizes, modes, attention, compute = json.loads(sys.argv[1])
make = lambda: tiny("llama", dtype=torch.float32, attention=attention, **sizes)
how = dict(batch=4, seq_len=1024, param_dtype=getattr(torch, compute))
print(json.dumps([preflight(make, {"data_parallel": 1}, activation_checkpointing=m, **how).peak for m in modes]))
"""


# In float32, grouped heads have no kernel on a GPU that keeps no scores.
@pytest.mark.parametrize(("attention", "compute"), [("eager", "float32"), ("sdpa", "bfloat16")])
@pytest.mark.ranks(1, timeout=300)
def test_a_preflight_says_what_the_allocator_of_a_gpu_reaches(attention, compute):
    modes = [False, "full", "selective"]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps([SIZES, modes, attention, compute])]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=AXES[:1])
    ids = token_batch(4, 1024, vocab_size=8192)[0].cuda()
    print("\n| attention | recomputed | preflight, MiB | allocated, MiB |\n|---|---|---|---|")
    measured = []
    for mode, peak in zip(modes, told, strict=True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = tiny("llama", dtype=torch.float32, attention=attention, **SIZES).cuda()
        fsdp2_strategy_parallelize(model, mesh, getattr(torch, compute), activation_checkpointing=mode)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):  # the second step has the optimizer's state and the workspaces of the products
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        measured.append(torch.cuda.max_memory_allocated() - before)
        print(f"| {attention} | {mode} | {peak / 2**20:.0f} | {measured[-1] / 2**20:.0f} |")
        del model, optimizer
    for mode, peak, allocated in zip(modes, told, measured, strict=True):
        assert peak == pytest.approx(allocated, rel=0.1), mode
