"""Every mixture of experts among the causal language models of transformers: two steps with clipping on spread experts,
against one process.

Two ranks run a type with the attention that transformers takes by itself, four ranks with eager.

One of each kind runs always; with `AM_SWEEP=folder` every type does, on four ranks too (experts over two with two
copies of each, and over four), and leaves there what it measured: `nox -s sweep` writes `docs/coverage/experts.md`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.auto.configuration_auto import model_type_to_module_name

from am_moe import apply_ep, apply_fsdp, describe_experts
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.zoo import NOT_BUILT, logits_of, model_types, runnable, small

SWEEP = os.environ.get("AM_SWEEP")
# transformers computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# What makes the small model of a type a mixture of experts, or small, where its default config does not.
_GEMMA4 = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
SETTINGS: dict[str, dict] = {
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "dots3_note_text": {"layers": 2},  # its later layers have sizes of their own, which are not small
}
# Small gradients of parts in float32: hyper-connections, a scale of the router.
LOOSE = {"deepseek_v4": 5e-4, "gemma4": 1e-4, "gemma4_text": 1e-4}
MODELING = pathlib.Path(transformers.__path__[0], "models")
STACKED = re.compile(r"nn\.Parameter\(\s*torch\.\w+\(\s*\(?(self\.)?\w*(num_experts|total_experts)\w*[\s,*]")


def source(model_type):
    folder = model_type_to_module_name(model_type)
    file = MODELING / folder / f"modeling_{folder}.py"
    return file.read_text() if file.exists() else ""


def stacked_classes(code):
    """The classes of a modeling file that hold stacked experts, with the names that their forward takes."""
    found = {}
    for part in re.split(r"^(?=class |@|def )", code, flags=re.MULTILINE):
        if not (name := re.match(r"class (\w+)\(", part)) or not STACKED.search(part):
            continue
        signature = re.search(r"def forward\((.*?)\)", part, re.DOTALL)
        names = re.findall(r"(\w+)\s*(?::[^,]*|=[^,]*)?(?:,|$)", signature.group(1)) if signature else []
        if not name.group(1).endswith(("Router", "Gate", "ExpertGLU")):
            found[name.group(1)] = tuple(names[1:])
    return found


ALWAYS = ["aria_text", "dbrx", "deepseek_v3", "ernie4_5_moe", "gemma4_text", "glm4_moe", "gpt_oss", "granitemoe"]
ALWAYS += ["jamba", "jetmoe", "llama4_text", "longcat_flash", "minimax_m2", "nemotron_h", "qwen3_moe", "qwen3_next"]
TYPES = [
    name
    for name in (model_types() if SWEEP else ALWAYS)
    if name not in NOT_BUILT and (stacked_classes(source(name)) or "Experts(nn.Module)" in source(name))
]


def test_every_class_of_transformers_with_stacked_experts_is_called_in_a_way_we_know():
    from am_moe.expert_parallel.experts import _CALLS

    found = {}
    for file in sorted(MODELING.glob("*/modeling_*.py")):
        found |= stacked_classes(file.read_text())
    assert len(found) >= 60
    unknown = {name: names for name, names in found.items() if names not in _CALLS}
    assert not unknown


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(2, timeout=120)
def test_every_mixture_of_experts_trains_as_in_one_process_on_two_ranks(model_type):
    measure(model_type, {"ep 2": (1, 2)}, attention=None)


if SWEEP:

    @pytest.mark.parametrize("model_type", TYPES)
    @pytest.mark.ranks(4, timeout=240)
    def test_every_mixture_of_experts_trains_as_in_one_process_on_four_ranks(model_type):
        measure(model_type, {"ep 2 x ep_shard 2": (2, 2), "ep 4": (1, 4)}, attention="eager")


def measure(model_type, layouts, attention):
    settings = SETTINGS.get(model_type, {}) | {"attention": attention}
    reference, dtype = runnable(model_type, **settings)
    found = describe_experts(reference)
    assert found
    kinds = {experts.kind: experts for experts in found}
    results = {
        "dtype": str(dtype).removeprefix("torch."),
        "kind": type(reference).__name__,
        "experts": ", ".join(sorted(kinds)),
        "call": ", ".join(sorted({experts.call for experts in found})),
        "layers": len(found),
    }
    history = list(train(reference, 0, 1, step_size=1.0))
    for name, (copies, ep) in layouts.items():
        mesh = init_device_mesh(device_type(), (copies * ep,), mesh_dim_names=("dp",))
        moe_mesh = init_device_mesh(device_type(), (copies, ep), mesh_dim_names=("ep_shard", "ep"))
        model = small(model_type, dtype=dtype, **settings)
        names = set(model.state_dict())
        apply_ep(model, moe_mesh["ep"], moe_mesh)
        apply_fsdp(model, mesh, True, copies > 1, moe_mesh["ep_shard"])
        assert set(model.state_dict()) == names
        worst = 0.0
        for (logits, loss, norm, grads, weights), expected in zip(
            train(model, dist.get_rank(), copies * ep, step_size=1.0), history, strict=True
        ):
            rows = slice(dist.get_rank() * 4 // (copies * ep), (dist.get_rank() + 1) * 4 // (copies * ep))
            loss = loss.clone()
            dist.all_reduce(loss)
            largest = max((g.abs().max().item() for g in expected[3].values()), default=0.0)
            errors = {
                "logits": relative_error(logits, expected[0][rows], 0.0),
                "loss": relative_error(loss / (copies * ep), expected[1], 0.0),
                "norm": relative_error(norm, expected[2], 0.0),
            }
            for key, value in grads.items():
                target = expected[3].get(key)
                target = torch.zeros_like(value) if target is None else target
                errors[f"gradient of {key}"] = relative_error(value, target[: value.shape[0]], 1e-6 * largest)
            assert set(expected[3]) <= set(grads)
            for key, value in weights.items():
                errors[key] = relative_error(value, expected[4][key][: value.shape[0]], 0.0)
            what = max(errors, key=errors.get)
            total = torch.tensor(errors[what], dtype=torch.float64)
            dist.all_reduce(total, dist.ReduceOp.MAX)
            worst = max(worst, total.item())
            tolerance = LOOSE.get(model_type, TOLERANCE[dtype])
            assert worst < tolerance, f"{name} is off by {worst:.1e} (here {errors[what]:.1e} in {what})"
        results[name] = worst
    if SWEEP and dist.get_rank() == 0:
        file = pathlib.Path(SWEEP, f"experts-{model_type}.json")
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | results))


def train(model, rank, ranks, step_size):
    """Two steps of SGD with the whole gradient's norm clipped to 0.1, on this rank's share of a batch of four."""
    share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        ids, labels = (torch.randint(3, 60, (4, 16), generator=generator) for _ in range(2))
        logits = logits_of(model, ids[share])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[share].flatten())
        loss.backward()
        grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.stack([g.double().norm() for g in grads.values()]).norm()
        factor = min(1.0, 0.1 / norm.item())
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad.to(parameter.dtype), alpha=-step_size * factor)
                parameter.grad = None
        weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
        yield logits.detach(), loss.detach(), norm, {n: g.clone() for n, g in grads.items()}, weights
