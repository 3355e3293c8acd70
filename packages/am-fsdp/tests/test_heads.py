"""Heads, encoder-decoders, speech, images and encoders under FSDP2 and HSDP; images with text: `test_some_ranks.py`.

Each rank has a batch of its own, of another length. One type of each kind runs always; with `AM_SWEEP=folder` all that
can be had small do, and leave there what they measured.
"""

from __future__ import annotations

import inspect
import json
import os
import pathlib
import re

import pytest
import torch
import torch.distributed as dist
import transformers.models.bert.modeling_bert  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import clip_grad_norm_, fsdp2_strategy_parallelize
from am_testkit.device import device_type
from am_testkit.exact import relative_error, whole
from am_testkit.heads import DECODER_TOKENS, TOKENS, inputs_for, small_for, types_for
from am_testkit.zoo import small

SWEEP = os.environ.get("AM_SWEEP")
ALWAYS = {
    "translation": ["t5"],
    "speech": ["whisper"],
    "masked": ["modernvbert"],
    "sequence": ["bart"],
    "token": ["bert"],
    "question": ["xlnet"],
    "image": ["vit"],
    "encoding": ["t5"],
}
TYPES = [(task, name) for task, always in ALWAYS.items() for name in (types_for(task) if SWEEP else always)]
ON_FOUR = [pair for pair in TYPES if pair[1] in ALWAYS[pair[0]]] + TYPES[::5] if SWEEP else [("translation", "t5")]
# Why a model is not laid out, in the words of the error.
REFUSED = {
    ("masked", "mobilebert"): r"dense.weight of \(0, 96\) is empty",  # an embedding as wide as the layers
    ("speech", "vibevoice"): "latent_scaling_factor is a scalar",
}
# With a mask on some ranks only it would be refused: which of its stacks run may depend on it.
MASKED_EVERYWHERE = ("canine",)
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
ROWS = 2
LARGEST = 30_000_000  # parameters of a model of which every rank has two


@pytest.mark.parametrize(("task", "model_type"), TYPES)
@pytest.mark.ranks(2, timeout=240)
def test_every_head_trains_as_in_one_process_on_two_data_ranks(task, model_type):
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    measure(task, model_type, "fsdp2", mesh, "data_parallel", attention=None)


@pytest.mark.parametrize(("task", "model_type"), dict.fromkeys(ON_FOUR))
@pytest.mark.ranks(4, timeout=300)
def test_heads_train_as_in_one_process_on_two_copies_of_two_shards(task, model_type):
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("copies", "shards"))
    measure(task, model_type, "hsdp2x2", mesh, ("copies", "shards"), attention="eager")


def measure(task, model_type, layout, mesh, axes, attention):
    """Two steps whose gradients add up, with an evaluation between them, then clipping."""
    one, dtype, why = runnable(task, model_type, attention)
    if one is None:
        record(task, model_type, {"not built": why})
        assert SWEEP, why
        return
    found = {"kind": type(one).__name__, "dtype": str(dtype).removeprefix("torch.")}
    model = small_for(task, model_type, dtype, attention)  # the same weights, and no state of a forward (LeViT)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    try:
        fsdp2_strategy_parallelize(model, mesh, dtype, dp_mesh_name=axes)
        errors = []
        for call, training in enumerate((True, False, True)):
            for place in range(ranks):
                batch = batch_of(one, task, call * ranks + place)
                with torch.set_grad_enabled(training):
                    expected = outputs_of(one, batch)
                if training:
                    (mean_square(expected) / ranks).backward()
                if place == rank:
                    mine, wanted = batch, [tensor.detach() for tensor in expected]
            with torch.set_grad_enabled(training):
                outputs = outputs_of(model, mine)
            if training:
                mean_square(outputs).backward()
            errors += [relative_error(got, right, 1e-12) for got, right in zip(outputs, wanted, strict=True)]
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal or (task, model_type) in REFUSED:
        record(task, model_type, found | {layout: f"refused: {refusal}"})
        assert re.search(REFUSED.get((task, model_type), "not refused"), refusal), refusal
        return
    norm = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
    errors.append(abs(clip_grad_norm_(model.parameters(), 0.1).item() - norm.item()) / norm.item())
    gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    floor = (1e-6 if dtype is torch.float64 else 1e-3) * max(g.abs().max().item() for g in gradients.values())
    for name, parameter in model.named_parameters():
        right = gradients.get(name, torch.zeros(parameter.shape, dtype=dtype))
        assert parameter.grad is not None or not right.any(), f"{name} has no gradient"
        if parameter.grad is not None:
            errors.append(relative_error(whole(parameter.grad), right, floor))
    worst = torch.tensor(max(errors), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    record(task, model_type, found | {layout: worst.item()})
    assert worst.item() < TOLERANCE[dtype], f"{layout} is off by {worst.item():.1e}"


def batch_of(model, task, seed):
    """A batch of a length of its own; all but the first padded on the right where the model takes ids and a mask."""
    padded = seed > 0 or model.config.model_type in MASKED_EVERYWHERE
    return inputs_for(model, task, ROWS, seed, TOKENS - 2 * (seed % 3), DECODER_TOKENS - seed % 3, padded=padded)


def outputs_of(model, batch):
    """Every tensor of floating-point numbers that a model returns, but for caches."""
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return list(floats_in(model(**batch, **settings)))


def floats_in(value):
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.dim():
            yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from floats_in(each)


def mean_square(tensors):
    return sum((t.double() - torch.linspace(-1, 1, t.shape[-1])).square().mean() for t in tensors if t.requires_grad)


def runnable(task, model_type, attention):
    for dtype in (torch.float64, torch.float32):
        try:
            model = small_for(task, model_type, dtype, attention)
            if sum(p.numel() for p in model.parameters()) > LARGEST:
                return None, None, "it is not small"
            if len({p.dtype for p in model.parameters()}) > 1:
                continue  # FSDP2 shards one dtype in a unit: some keep float32 beside float64
            for step in (1, 2):  # LeViT keeps the graph of its first step in evaluation mode
                mean_square(outputs_of(model, batch_of(model, task, step))).backward()
            if all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()):
                model.zero_grad()
                return model, dtype, ""
            why = "its own gradients have NaN"
        except Exception as error:  # in float64; or the model cannot be had small at all
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None, None, why


def record(task, model_type, results):
    if SWEEP and dist.get_rank() == 0:
        file = pathlib.Path(SWEEP, f"data_heads-{task}-{model_type}.json")
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | results))


@pytest.mark.ranks(2)
def test_a_module_that_trains_another_dtype_than_those_in_it_is_refused_before_anything_is_sharded():
    """FSDP2 would only say so in the first forward, as of DeBERTa's biases."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])})
    model = model.double()
    odd = torch.nn.ModuleDict({"inner": torch.nn.Linear(4, 4).double()})
    odd.bias = torch.nn.Parameter(torch.zeros(4))
    model["layers"].append(odd)
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    with pytest.raises(ValueError, match=r"layers\.2 and modules in it train .*float32.*float64.*one dtype in a unit"):
        fsdp2_strategy_parallelize(model, mesh, torch.float64)
    assert not any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


@pytest.mark.ranks(2)
def test_a_scalar_parameter_is_refused_before_anything_is_sharded_and_trains_with_a_dimension():
    """As CLIP's temperature; torch would say so when other units are sharded already."""
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    model.scale = torch.nn.Parameter(torch.tensor(2.0))
    model.forward = lambda x: model.layers[1](model.layers[0](x)) * model.scale
    with pytest.raises(ValueError, match=r"scale is a scalar.*owner\.scale = torch.nn.Parameter"):
        fsdp2_strategy_parallelize(model, mesh, dp_mesh_name="data_parallel")
    assert not any(hasattr(p, "placements") for p in model.parameters())
    owner = model.get_submodule("")
    owner.scale = torch.nn.Parameter(owner.scale.detach()[None])
    fsdp2_strategy_parallelize(model, mesh, dp_mesh_name="data_parallel")
    assert all(hasattr(p, "placements") for p in model.parameters())


def a_new_head(model):
    model.lm_head = torch.nn.Linear(32, 96, bias=False)


def an_adapter(model):
    model.lm_head.adapter = torch.nn.Linear(32, 4, bias=False)


@pytest.mark.parametrize("change", [a_new_head, an_adapter])
@pytest.mark.ranks(2)
def test_what_is_added_after_the_layout_is_refused_also_when_an_evaluation_came_before(change):
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    ids = torch.ones(2, 8, dtype=torch.int64)
    for evaluated in (False, True):
        model = fsdp2_strategy_parallelize(small("llama", layers=2, dtype=torch.float32), mesh)
        for _ in range(2 * evaluated):
            with torch.no_grad():
                model(ids)
        change(model)
        with pytest.raises(ValueError, match=r"lm_head.*were added to .* after it was laid out"):
            model(ids)
    kept = fsdp2_strategy_parallelize(small("llama", layers=2, dtype=torch.float32), mesh)
    for _ in range(2):
        with torch.no_grad():
            kept(ids)
        kept(ids).logits.sum().backward()
