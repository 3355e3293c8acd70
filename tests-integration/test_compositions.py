"""The five packages together: what a composition of all parallelisms trains is what one process trains.

Generated from the axes of `am_testkit.compositions`. A subset that covers every pair of degrees runs always; with
`AM_SWEEP=folder` the whole product does, and leaves there what it measured: `nox -s compositions`. The models are laid
out by the code of `docs/examples`, which is what users start from.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.mistral.modeling_mistral
import transformers.models.qwen2_moe.modeling_qwen2_moe
import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import am_fsdp
import am_moe
from am_testkit import compositions
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error, whole
from am_testkit.models import next_token_loss, tiny, token_batch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

from training import checkpoint
from training.degrees import Degrees
from training.layout import Layout, lay_out
from training.model import add_adapters

SWEEP = os.environ.get("AM_SWEEP")
MODELS = {
    "tied": ("qwen3", {"tied": True}),
    "sliding window": ("mistral", {"sliding_window": 5}),
    "shared experts": ("qwen2_moe", {}),
    "adapters": ("llama", {}),
}
EXPERTS = {model: family.endswith("moe") for model, (family, _) in MODELS.items()}
EVERY = [{"model": model, **degrees} for model in MODELS for degrees in compositions.product()]
LEGAL = [c for c in EVERY if not compositions.why_not(c, EXPERTS[c["model"]])]
CASES = LEGAL if SWEEP else compositions.pairwise(LEGAL)
BATCH, TOKENS = 8, 16
# transformers computes norms and softmax in float32 even in a float64 model. Where a gradient is nothing but that
# rounding, AdamW's usual eps would make a whole step of it; 1e-6 keeps such elements still.
TOLERANCE = 1e-5
ADAMW = {"lr": 1e-3, "eps": 1e-6, "foreach": False}


def case(composition):
    marks = pytest.mark.ranks(compositions.ranks(composition), timeout=120)
    return pytest.param(composition, id=f"{composition['model']}-{compositions.name(composition)}", marks=marks)


@pytest.mark.parametrize("composition", map(case, CASES))
def test_a_composition_trains_like_one_process(composition):
    errors = compare(composition)
    worst = largest_anywhere(max(errors.values()))
    record(f"{composition['model']}-{compositions.name(composition)}", composition | {"error": worst})
    bad = {what: f"{error:.1e}" for what, error in errors.items() if not error <= TOLERANCE}
    assert worst <= TOLERANCE, f"off by {worst:.1e}, here by {bad}"


def compare(composition):
    """Relative errors of loss, gradients, norm, and weights after three clipped steps, by what and which."""
    model = build(composition["model"])
    one = copy.deepcopy(model)
    degrees = degrees_of(composition)
    laid_out, rows = place(model, degrees)
    optimizers = [optimizer_of(part) for part in (*laid_out.parts, one)]
    errors = {}
    for step in range(3):
        ids, labels = token_batch(BATCH, TOKENS, seed=step)
        loss = laid_out.step(ids[rows], labels[rows])
        expected = next_token_loss(one(ids, use_cache=False).logits, labels)
        expected.backward()
        errors[f"loss {step}"] = relative_error(mean_over_world(loss), expected)
        wanted = gradients(one)
        for part in laid_out.parts:
            for name, gradient in gradients(part).items():
                errors[f"gradient {step} of {name}"] = relative_error(gradient, wanted[name])
        norm = clip(laid_out, degrees.pp)
        errors[f"norm {step}"] = relative_error(norm, torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    weights = dict(one.named_parameters(remove_duplicate=False))
    for part in laid_out.parts:
        for name, parameter in part.named_parameters():
            errors[f"weight {name}"] = relative_error(parameter, weights[name])
    return errors


@pytest.mark.parametrize("model", MODELS)
def test_what_is_illegal_is_refused_with_what_would_be_legal(model):
    illegal = [c for c in EVERY if c["model"] == model and c not in LEGAL]
    assert illegal
    config = build(model).config
    for composition in illegal:
        degrees = degrees_of(composition)
        words = {"the model has no experts": "has no experts; use --ep 1"}.get(
            compositions.why_not(composition, EXPERTS[model]), f"--ep {degrees.ep} must divide .*; it can be 1"
        )
        if degrees.world // degrees.pp % degrees.ep:
            words = f"--ep {degrees.ep} must divide .*; it can be 1"
            with pytest.raises(ValueError, match=f"ep {degrees.ep} does not divide .* it can be"):
                am_moe.meshes.check_degrees(
                    {"pp": degrees.pp, "dp": degrees.world // degrees.pp}, degrees.ep, degrees.world
                )
        with pytest.raises(ValueError, match=words):
            degrees.check(degrees.world, config, BATCH, microbatch(degrees), TOKENS)
    for composition in LEGAL:
        if composition["model"] == model:
            degrees = degrees_of(composition)
            degrees.check(degrees.world, config, BATCH, microbatch(degrees), TOKENS)


@pytest.mark.ranks(2)
def test_experts_over_an_axis_are_refused_by_a_model_that_has_none():
    world, experts = am_moe.build_meshes(device_type(), dp_shard=2, ep=2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        am_moe.parallelize_model(build("adapters"), world, experts, dp_axis_names=("dp_shard",), ep_axis_name="ep")


# Everything that a checkpoint can be cut by, on four ranks. Each saves; each resumes what the one before it saved, in
# the sweep what any saved.
SAVED = {
    "shared experts": [
        {"pp": 2, "dp_shard": 2, "ep": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 4},
        {"dp_shard": 2, "cp": 2, "ep": 2},
        {"dp_shard": 2, "tp": "2 sp", "ep": 2},
        {"pp": 2, "tp": 2},
        {"dp_shard": 4},
    ],
    "tied": [{"pp": 2, "dp_shard": 2}, {"pp": 2, "tp": 2}, {"cp": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}],
    "adapters": [{"pp": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": "2 sp"}, {"dp_replicate": 2, "cp": 2}],
}
SAVED["sliding window"] = SAVED["tied"]


@pytest.mark.parametrize("model", SAVED)
@pytest.mark.ranks(4, timeout=600 if SWEEP else 180)
def test_what_one_layout_saves_another_resumes(model, tmp_path):
    layouts = [dict.fromkeys(compositions.AXES, 1) | degrees for degrees in SAVED[model]]
    one = build(model)
    optimizer = optimizer_of(one)
    weights = []
    for step in range(3):
        train_alone(one, optimizer, step)
        weights.append({n: p.detach().clone() for n, p in one.named_parameters(remove_duplicate=False)})
    for number, layout in enumerate(layouts):
        laid_out, rows = place(build(model), degrees_of(layout))
        optimizers = [optimizer_of(part) for part in laid_out.parts]
        for step in range(2):
            train(laid_out, rows, optimizers, layout["pp"], step)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 7.0  # who resumes brings a rate of their own
        checkpoint.save(tmp_path / str(number), 2, laid_out.parts, optimizers)
        for part in laid_out.parts:
            label = f"weights saved by {compositions.name(layout)}"
            assert_same(dict(part.named_parameters()), weights[1], TOLERANCE, label)
    onward = zip(enumerate(layouts), layouts[1:] + layouts[:1], strict=True)
    for (number, source), layout in itertools.product(enumerate(layouts), layouts) if SWEEP else onward:
        laid_out, rows = place(build(model, seed=7), degrees_of(layout))
        optimizers = [optimizer_of(part) for part in laid_out.parts]
        path = checkpoint.latest(tmp_path / str(number))
        assert checkpoint.load(path, laid_out.parts, optimizers) == 2
        train(laid_out, rows, optimizers, layout["pp"], 2)
        errors = [
            relative_error(parameter, weights[2][name])
            for part in laid_out.parts
            for name, parameter in part.named_parameters()
        ]
        worst = largest_anywhere(max(errors))
        saved, resumed = compositions.name(source), compositions.name(layout)
        record(f"{model}-{saved}-to-{resumed}", {"model": model, "saved": saved, "resumed": resumed, "error": worst})
        assert worst <= TOLERANCE, f"{resumed} resumed from {saved} is off by {worst:.1e}"


def build(model, seed=0):
    family, settings = MODELS[model]
    # Eager attention computes its softmax in float32, attention over a context axis does not.
    built = tiny(family, attention="sdpa", seed=seed, **settings)
    if model == "adapters":
        add_adapters(built, 3, seed)
        with torch.no_grad():  # an adapter starts at zero, which would leave half of it without a gradient
            for name, parameter in built.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return built.double()


def degrees_of(composition):
    degrees = {axis: composition[axis] for axis in compositions.AXES}
    sequence = degrees["tp"] == "2 sp"
    return Degrees(**degrees | {"tp": 2 if sequence else degrees["tp"]}, sequence_parallel=sequence)


def place(model, degrees) -> tuple[Layout, slice]:
    meshes = degrees.meshes(device_type())
    laid_out = lay_out(
        model,
        degrees,
        meshes,
        schedule="1F1B",
        microbatch=microbatch(degrees),
        local_batch=BATCH // degrees.dp,
        device=torch.device(device_type()),
    )
    return laid_out, degrees.rows(meshes[0], BATCH)


def microbatch(degrees):
    """Sequences per microbatch: at least two microbatches, as two stages need."""
    return min(2, BATCH // degrees.dp // 2)


def optimizer_of(part):
    return torch.optim.AdamW((p for p in part.parameters() if p.requires_grad), **ADAMW)


def train(laid_out, rows, optimizers, stages, step):
    ids, labels = token_batch(BATCH, TOKENS, seed=step)
    laid_out.step(ids[rows], labels[rows])
    clip(laid_out, stages)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def clip(laid_out, stages):
    parameters = [p for part in laid_out.parts for p in part.parameters()]
    return am_fsdp.clip_grad_norm_(parameters, 0.1, pipeline_shards=stages, duplicates=laid_out.duplicates)


def train_alone(model, optimizer, step):
    ids, labels = token_batch(BATCH, TOKENS, seed=step)
    next_token_loss(model(ids, use_cache=False).logits, labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def mean_over_world(loss):
    """Of the ranks that have a loss: each has the mean over its tokens, of which all have as many."""
    pair = torch.zeros(2, dtype=torch.float64)
    if loss is not None:
        pair += torch.stack([whole(loss).double(), torch.ones((), dtype=torch.float64)])
    dist.all_reduce(pair)
    return pair[0] / pair[1]


def largest_anywhere(error):
    worst = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def record(name, result):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"compositions-{name.replace(' ', '_')}.json").write_text(json.dumps(result))
