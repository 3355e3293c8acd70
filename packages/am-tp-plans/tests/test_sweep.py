"""transformers' own tensor-parallel plans in our styles, and inferred ones for models that bring none, at two ranks.

A type of each mechanism runs always, one with the attention that transformers takes by itself (sdpa where the type has
it), the next with eager. With `AM_SWEEP=folder` all do, under both, and leave there what they measured; `nox -s sweep`
makes `docs/coverage/tensor.md` of it.
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

from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.models import next_token_loss
from am_testkit.zoo import MECHANISMS, NOT_BUILT, logits_of, model_types, runnable, small, small_config
from am_tp_plans import add_sequence_parallelism, apply_plan, fit_plan, get_hf_tp_shard_plan, infer_plan
from am_tp_plans.styles.heads import shares_heads

# Why a plan that transformers brings is not applied, in the words of the error.
REFUSED = {
    "big_bird": "its forward replaces modules, and what a plan did to them is lost",
    "doge": "on one rank's share its forward fails|one rank's features and a whole activation",
    "gemma3n_text": "it takes the mean over features of which each rank has a share",
    "jetmoe": "the plan does not fit JetMoeForCausalLM",
    "longcat_flash": "no module of stacked experts",
}
# Where the sequence cannot be sharded between the layers; `docs/coverage/tensor.md` says why.
SEQUENCE_REFUSED = """
    bitnet bloom ctrl dbrx deepseek_v4 falcon_mamba gpt_oss hy_v4 inkling2_text mamba mamba2 mllama mpt openai-gpt opt
    qwen4_exp qwen4_exp_text reformer rwkv xlm xlnet xmod zamba zamba2 zaya
"""
IMPLEMENTATION = {"sdpa": None, "eager": "eager"}  # None is what transformers takes by itself
SWEEP = os.environ.get("AM_SWEEP")
TYPES = [name for name in (model_types() if SWEEP else MECHANISMS) if name not in NOT_BUILT]
# transformers computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


def brings_a_plan(model_type: str) -> bool:
    config = small_config(model_type)
    return bool(getattr(config.get_text_config(decoder=True), "base_model_tp_plan", None))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(2, timeout=240)
def test_the_plan_of_every_model_is_exact_or_refused(model_type):
    """transformers' own plan where it brings one, an inferred one where it does not."""
    make_plan, source = (
        (get_hf_tp_shard_plan, "transformers") if brings_a_plan(model_type) else (infer_plan, "inferred")
    )
    cases = ("sdpa", "eager") if SWEEP else (("sdpa", "eager")[TYPES.index(model_type) % 2],)
    if model_type in REFUSED:
        for attention in cases:
            fresh = small(model_type, attention=IMPLEMENTATION[attention])
            with pytest.raises((ValueError, TypeError), match=REFUSED[model_type]) as refusal:
                apply_plan(fresh, init_device_mesh(device_type(), (2,)), make_plan(fresh))
        record(model_type, refused=str(refusal.value), source=source)
        return
    measured = {"source": source}
    for attention in cases:
        for name, value in measure(model_type, make_plan, attention).items():
            numbers = isinstance(value, float) and name in measured
            measured[name] = max(measured[name], value) if numbers else value
    record(model_type, **measured)
    assert ("sequence_refused" in measured) == (model_type in SEQUENCE_REFUSED.split()), measured


@pytest.mark.parametrize("model_type", TYPES[:: 1 if SWEEP else 6])
@pytest.mark.ranks(4, timeout=240)
def test_a_plan_whose_ranks_share_key_value_heads_is_exact_or_refused(model_type):
    """The small models have four query heads and two key/value heads."""
    make_plan = get_hf_tp_shard_plan if brings_a_plan(model_type) else infer_plan
    attention = ("sdpa", "eager")[TYPES.index(model_type) % 2]
    model = small(model_type, attention=IMPLEMENTATION[attention])
    try:
        fitted = fit_plan(model, make_plan(model), 4)
    except (ValueError, TypeError):
        return
    if any(map(shares_heads, fitted.values())):
        measure(model_type, make_plan, attention)


def measure(model_type, make_plan, attention):
    """The largest errors of a type's plans under one attention implementation."""
    model, dtype = runnable(model_type, attention=IMPLEMENTATION[attention])
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(2))
    expected = logits_of(model, ids)
    next_token_loss(whole(expected), labels).backward()
    wanted = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    # some models change themselves in their first forward
    fresh = small(model_type, dtype=dtype, attention=IMPLEMENTATION[attention])
    plans = {"error": make_plan(fresh)}
    nan = any(grad.isnan().any() for grad in wanted.values())
    measured = {"nan": bool(nan), "dtype": str(dtype).removeprefix("torch."), "kind": type(model).__name__}
    try:
        plans["sequence"] = add_sequence_parallelism(fresh, plans["error"])
    except ValueError as error:
        measured["sequence_refused"] = str(error)
    for name, plan in plans.items():
        sharded = small(model_type, dtype=dtype, attention=IMPLEMENTATION[attention])
        measured[name], measured["held"] = compare(sharded, dtype, plan, ids, labels, expected, wanted)
    return measured


def compare(sharded, dtype, plan, ids, labels, expected, wanted):
    """The largest error of logits and gradients under a plan, on any rank, and the share of parameters it holds."""
    apply_plan(sharded, init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",)), plan)
    logits = logits_of(sharded, ids)
    next_token_loss(whole(logits), labels).backward()
    largest = max(grad.nan_to_num().abs().max().item() for grad in wanted.values())
    errors = [relative_error(whole(logits), expected, 0.0, nan_is_nan=True)]
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        missing = parameter.grad is None and name in wanted and wanted[name].nan_to_num().abs().max() > 0
        assert not missing, f"{name} has no gradient"
        if parameter.grad is not None:
            target = wanted.get(name, torch.zeros(parameter.shape, dtype=dtype))
            error = relative_error(whole(parameter.grad), target, 1e-6 * largest, nan_is_nan=True)
            assert error < TOLERANCE[dtype], f"the gradient of {name} is off by {error:.1e}"
            errors.append(error)
    worst = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    assert worst.item() < TOLERANCE[dtype]
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in sharded.parameters())
    return worst.item(), held / sum(p.numel() for p in sharded.parameters())


def record(model_type, **measured):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"tensor-{model_type}.json").write_text(json.dumps(measured))
