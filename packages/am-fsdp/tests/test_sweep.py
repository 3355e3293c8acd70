"""Every causal language model of transformers under FSDP2: one step with clipping, against one process.

Two ranks run a type with the attention that transformers takes by itself, four ranks with eager.

A type of each mechanism runs always. With `AM_SWEEP=folder` all do, on four ranks too (HSDP 2 x 2, and 2 x tensor 2 for
those with a plan), and leave there what they measured; `nox -s sweep` makes `docs/coverage/data.md` of it.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from am_fsdp import clip_grad_norm_, fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.models import next_token_loss
from am_testkit.zoo import MECHANISMS, NOT_BUILT, logits_of, model_types, runnable, small
from am_tp_plans import explain_plan, get_hf_tp_shard_plan, infer_plan

# Why a model is not laid out, in the words of the error.
REFUSED = {
    "olmo_hybrid": r"linear_attn holds parameters of .* FSDP2 shards one dtype in a unit",
    "reformer": "got mixed torch.Tensor and DTensor",  # its layers run their own backward, past FSDP2's hooks
    "zamba": r"mamba holds parameters of .* FSDP2 shards one dtype in a unit",
}
SWEEP = os.environ.get("AM_SWEEP")
# transformers computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
AXES = ("data_parallel", "tensor_parallel")
TYPES = [name for name in (model_types() if SWEEP else MECHANISMS) if name not in NOT_BUILT]


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(2, timeout=120)
def test_every_model_trains_as_in_one_process_on_two_data_ranks(model_type):
    layouts = {"fsdp2": (init_device_mesh(device_type(), (2,), mesh_dim_names=AXES[:1]), "data_parallel", None)}
    measure(model_type, layouts, attention=None)


if SWEEP:  # four ranks each take a quarter of an hour together

    @pytest.mark.parametrize("model_type", TYPES)
    @pytest.mark.ranks(4, timeout=240)
    def test_every_model_trains_as_in_one_process_on_four_ranks(model_type):
        on_four_ranks(model_type)


def on_four_ranks(model_type):
    hybrid = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "shards"))
    layouts = {"hsdp2x2": (hybrid, ("replicas", "shards"), None)}
    model = small(model_type)
    for make in (get_hf_tp_shard_plan, infer_plan):
        try:
            plan = make(model)
            explain_plan(model, plan, 2, seq_len=8)  # refuses what tensor parallelism would
            mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=AXES)
            layouts["fsdp2 x tp2"] = (mesh, "data_parallel", plan)
            break
        except (ValueError, TypeError):
            continue
    measure(model_type, layouts, attention="eager")


def measure(model_type, layouts, attention):
    reference, dtype = runnable(model_type, attention=attention)
    if model_type in REFUSED:
        mesh, data_names, _ = next(iter(layouts.values()))
        model = small(model_type, dtype=dtype, attention=attention)
        with pytest.raises((ValueError, RuntimeError), match=REFUSED[model_type]) as refusal:
            step_of(fsdp2_strategy_parallelize(model, mesh, dtype, dp_mesh_name=data_names))
        record(
            model_type,
            dict.fromkeys(layouts, f"refused: {refusal.value}") | {"kind": "", "dtype": ""},
        )
        return
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(2))
    expected = logits_of(reference, ids)
    next_token_loss(whole(expected), labels).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    broken = any(not gradient.isfinite().all() for gradient in wanted.values())
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    results = {"dtype": str(dtype).removeprefix("torch."), "kind": type(reference).__name__}
    for name, (mesh, data_names, plan) in layouts.items():
        model = small(model_type, dtype=dtype, attention=attention)
        fsdp2_strategy_parallelize(model, mesh, dtype, dp_mesh_name=data_names, tp_shard_plan=plan)
        data = mesh[data_names] if isinstance(data_names, str) else mesh[data_names]._flatten()
        share = slice(data.get_local_rank() * 4 // data.size(), (data.get_local_rank() + 1) * 4 // data.size())
        logits = logits_of(model, ids[share])
        next_token_loss(whole(logits), labels[share]).backward()
        total = clip_grad_norm_(model.parameters(), 0.1)
        errors = [relative_error(whole(logits), expected[share], 0.0, nan_is_nan=True)]
        if not broken:
            errors.append(abs(total.item() - norm.item()) / norm.item())
        largest = max((g.nan_to_num().abs().max().item() for g in wanted.values()), default=0.0)
        for key, parameter in model.named_parameters():
            if parameter.grad is not None and not broken:
                target = wanted.get(key, torch.zeros(parameter.shape, dtype=dtype))
                errors.append(relative_error(whole(parameter.grad), target, 1e-6 * largest, nan_is_nan=True))
            assert parameter.grad is not None or key not in wanted or wanted[key].abs().max() == 0, key
        worst = torch.tensor(max(errors), dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        tolerance = 1e-4 if model_type == "deepseek_v4" else TOLERANCE[dtype]  # its hyper-connections are in float32
        assert worst.item() < tolerance, f"{name} is off by {worst.item():.1e}"
        held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        results[name], results[f"{name} nan"] = worst.item(), broken
        results[f"{name} held"] = held / sum(p.numel() for p in model.parameters())
    record(model_type, results)


def step_of(model):
    logits_of(model, torch.ones(1, 16, dtype=torch.int64)).mean().backward()


def record(model_type, results):
    if SWEEP and dist.get_rank() == 0:
        file = pathlib.Path(SWEEP, f"data-{model_type}.json")
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | results))
