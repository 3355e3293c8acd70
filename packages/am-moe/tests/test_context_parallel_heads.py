"""What precedes and follows the stack under context parallelism: exact against one process, or refused by name.

A few types run always; with `AM_SWEEP=folder` all that build small do, and leave there what was measured.
"""

from __future__ import annotations

import copy
import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.auto import modeling_auto

from am_moe.context_parallel import apply, apply_cp, shard_batch, unshard_sequence
from am_testkit.device import device_type
from am_testkit.exact import relative_error
from am_testkit.zoo import let_weights_count, small, small_config

SWEEP = os.environ.get("AM_SWEEP")
ROWS, TOKENS = 2, 16
HEADS = {
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "question": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
ALWAYS = {
    "sequence": ["llama", "qwen3_moe", "bert", "gpt2", "roberta", "canine"],
    "token": ["mistral", "electra", "gpt_neox", "biogpt"],
    "masked": ["bert", "modernbert"],
    "question": ["llama", "bert"],
}
TYPES = [
    (head, name)
    for head, mapping in HEADS.items()
    for name in (getattr(modeling_auto, mapping) if SWEEP else ALWAYS[head])
]


def with_head(head, model_type, attention="eager", dtype=torch.float64, **settings):
    """A small model with a head; attention None for what transformers takes by itself."""
    config = small_config(model_type, 2, **settings)
    config.is_decoder = False
    config.pad_token_id = config.get_text_config().pad_token_id = 0
    if head in ("sequence", "token"):
        config.num_labels = 3
    torch.manual_seed(0)
    kind = getattr(transformers, getattr(modeling_auto, HEADS[head])[model_type])
    model = kind._from_config(config, dtype=dtype, attn_implementation=attention).eval()
    let_weights_count(model)
    return model


def batch_for(head, padded=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (ROWS, TOKENS), generator=generator)
    batch = {"input_ids": ids}
    if padded:  # the row's last token is not the last of any chunk
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, 11:] = 0
        ids[0, 11:] = 0
    if head == "sequence":
        batch["labels"] = torch.tensor([2, 0])
    elif head == "question":
        batch |= {"start_positions": torch.tensor([3, 9]), "end_positions": torch.tensor([5, 14])}
    else:
        labels = torch.randint(0, 3, (ROWS, TOKENS), generator=generator) if head == "token" else ids.clone()
        labels[:, 1:7] = -100  # more labels on one rank than on the other
        batch["labels"] = labels.masked_fill(ids == 0, -100)
    return batch


def averaged(tensor):
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def outputs_of(output):
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor) and name != "loss"}


def errors_of(one, model, batch, mesh, **call):
    """Relative differences of the loss, what the model returns, and every gradient."""
    positions = {} if "position_ids" in batch else {"position_ids": torch.arange(TOKENS)[None].expand(ROWS, -1)}
    expected = one(**batch | positions, **call)
    expected.loss.backward()
    out = model(**shard_batch(batch, mesh), **call)
    out.loss.backward()
    errors = {"loss": relative_error(averaged(out.loss), expected.loss.detach(), 0.0)}
    real = batch.get("attention_mask", torch.ones(ROWS, TOKENS)).bool()
    for name, value in outputs_of(expected).items():
        found = out[name]
        if found.shape != value.shape:
            found = unshard_sequence(found, mesh)
        if value.shape[:2] == real.shape:
            found, value = found[real], value[real]
        errors[name] = relative_error(found.detach(), value.detach(), 0.0)
    wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None and p.numel()}
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, parameter in model.named_parameters():
        if name in wanted:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            errors[name] = relative_error(averaged(gradient), wanted[name], 1e-4 * largest)
    return errors


def assert_exact(errors, tolerance=1e-5):
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, f"{worst} is off by {errors[worst]:.1e}"


def cp_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("cp",))["cp"]


@pytest.mark.parametrize(("head", "model_type"), TYPES)
@pytest.mark.ranks(2, timeout=120)
def test_every_head_is_exact_on_two_context_ranks_or_refused(head, model_type):
    # What transformers takes by itself, sdpa where a type has it; eager for a quarter.
    one = runnable(head, model_type, None if sum(map(ord, model_type)) % 4 else "eager")
    model, mesh = copy.deepcopy(one), cp_mesh()
    results, refusal, errors = {"kind": type(one).__name__, "attention": one.config._attn_implementation}, None, {}
    try:
        apply_cp(model, mesh)
        errors = errors_of(one, model, batch_for(head), mesh)
    except ValueError as error:
        refusal = str(error)
    record(head, model_type, results | {"cp2": f"refused: {refusal}" if refusal else max(errors.values())})
    if refusal is None:
        assert_exact(errors, 1e-5 if next(one.parameters()).dtype == torch.float64 else 1e-3)
    else:
        assert SWEEP or model_type in ("roberta", "canine"), refusal
        assert "context parallelism" in refusal or "cannot be cut" in refusal, refusal


def runnable(head, model_type, attention):
    """The model in float64, or in float32 where its own code mixes the two."""
    # Splinter multiplies its mask by the smallest float64 in float32: NaN.
    for dtype in (torch.float64, torch.float32)[model_type == "splinter" :]:
        try:
            one = with_head(head, model_type, attention, dtype)
            with torch.no_grad():
                one(**batch_for(head))
            return one
        except Exception as error:  # of any kind: what a config or a forward thinks of small sizes
            why = error
    record(head, model_type, {"cp2": f"not built: {type(why).__name__}: {str(why).splitlines()[0][:80]}"})
    pytest.skip(f"{model_type} does not build or run small: {why}")


def record(head, model_type, results):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"context_heads-{head}-{model_type}.json").write_text(json.dumps(results))


@pytest.mark.parametrize(("head", "model_type"), [("sequence", "llama"), ("token", "mistral"), ("question", "llama")])
@pytest.mark.ranks(2, timeout=120)
def test_padding_before_a_head_is_exact(head, model_type):
    one, mesh = with_head(head, model_type), cp_mesh()
    model = apply_cp(copy.deepcopy(one), mesh)
    assert_exact(errors_of(one, model, batch_for(head, padded=True), mesh))


@pytest.mark.parametrize("call", [{"logits_to_keep": 4}, {"output_hidden_states": True}, {"logits_to_keep": 5}])
@pytest.mark.ranks(2, timeout=120)
def test_what_a_call_asks_for_is_exact(call):
    one, mesh = small("llama", 2), cp_mesh()
    model, batch = apply_cp(copy.deepcopy(one), mesh), {"input_ids": batch_for("masked")["input_ids"]}
    expected, out = one(**batch, **call), model(**shard_batch(batch, mesh), **call)
    logits = out.logits if "logits_to_keep" in call else unshard_sequence(out.logits, mesh)
    assert relative_error(logits, expected.logits, 0.0) < 1e-6
    for mine, whole in zip(out.hidden_states or (), expected.hidden_states or (), strict=True):
        assert relative_error(unshard_sequence(mine, mesh), whole, 0.0) < 1e-6


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.ranks(2, timeout=120)
def test_a_router_loss_is_that_of_the_whole_batch(model_type):
    one, mesh = small(model_type, 2, output_router_logits=True, router_aux_loss_coef=0.5), cp_mesh()
    model = apply_cp(copy.deepcopy(one), mesh)
    ids = batch_for("masked")["input_ids"]
    expected = one(input_ids=ids, labels=ids, use_cache=False)
    out = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh))
    assert out.logits.shape[1] == TOKENS // 2, "logits stay this rank's"
    expected.loss.backward()
    out.loss.backward()
    assert relative_error(averaged(out.loss), expected.loss.detach(), 0.0) < 1e-6
    assert relative_error(out.aux_loss.detach(), expected.aux_loss.detach(), 0.0) < 1e-6
    wanted = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    largest = max(g.abs().max().item() for g in wanted.values())
    for name, parameter in model.named_parameters():
        if name in wanted:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert relative_error(averaged(gradient), wanted[name], 1e-4 * largest) < 1e-5, name


# Toy models, whose stack is Llama's: what is around it is theirs.


class Changed(nn.Module):
    def __init__(self, layer, change):
        super().__init__()
        self.inner, self.change = layer, change

    def forward(self, hidden_states, **kwargs):
        return self.inner(self.change(hidden_states), **kwargs)


MIXING = {
    "shift": lambda h: h + nn.functional.pad(h, (0, 0, 1, 0))[:, :-1],
    "roll": lambda h: h + h.roll(1, 1),
    "mean": lambda h: h + h.mean(1, keepdim=True),
    "sum": lambda h: h - h.sum((0, 1)),
    "cumsum": lambda h: h.cumsum(1),
    "max": lambda h: h + h.max(1, keepdim=True).values,
    "softmax": lambda h: h + h.softmax(1),
    "flip": lambda h: h + h.flip(1),
    "first token": lambda h: h + h[:, :1],
    "sort": lambda h: h.sort(1).values,
    "arange": lambda h: h + torch.arange(h.shape[1])[None, :, None],
    "number": lambda h: h / h.shape[1],
    "view": lambda h: h + h.reshape(h.shape[0], h.shape[2], h.shape[1]).mT,
    "sum along": lambda h: h + (h.mT @ h.mT.mT).mean(),
    "decides": lambda h: h if h.sum() > 0 else -h,
    "writes": lambda h: h.clone().index_fill_(1, torch.tensor([0]), 0.0),
    "cat": lambda h: torch.cat([h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2]], 1),
}


@pytest.mark.ranks(2, timeout=120)
def test_what_mixes_tokens_between_attention_is_refused_with_its_place():
    for change in MIXING.values():
        model = small("llama", 2)
        model.model.layers[1] = Changed(model.model.layers[1], change)
        before = model.config._attn_implementation
        message = r"context parallelism is not right for LlamaForCausalLM: .*layers\.1"
        with pytest.raises(ValueError, match=message):
            apply_cp(model, cp_mesh())
        assert model.config._attn_implementation == before


@pytest.mark.ranks(2)
def test_what_treats_every_token_alike_is_accepted_and_exact():
    def change(h):
        rows, tokens, width = h.shape
        flat = h.reshape(-1, width)
        turned = flat.view(rows, tokens, 4, -1).transpose(1, 2).transpose(1, 2).flatten(2)
        kept = torch.zeros_like(h)
        kept[..., ::2] = turned[..., ::2]
        top = h.topk(3, -1).indices
        marked = torch.zeros(rows, tokens, width, dtype=h.dtype).scatter_(-1, top, 1.0)
        return kept + marked * h.cumsum(-1) + h.flip(-1) + torch.stack([h, -h], 0).sum(0) + h.roll(2, -1)

    one, mesh = small("llama", 2), cp_mesh()
    one.model.layers[1] = Changed(one.model.layers[1], change)
    model = apply_cp(copy.deepcopy(one), mesh)
    ids = batch_for("masked")["input_ids"]
    expected = one(input_ids=ids, use_cache=False).logits
    out = model(**shard_batch({"input_ids": ids}, mesh)).logits
    assert relative_error(unshard_sequence(out, mesh), expected, 0.0) < 1e-6


@pytest.mark.ranks(2)
def test_inputs_are_gathered_in_one_order_though_processes_order_sets_differently(monkeypatch):
    class OfThisProcess(frozenset):
        def __iter__(self):
            return iter(sorted(super().__iter__(), reverse=dist.get_rank() == 1))

    monkeypatch.setattr(apply, "frozenset", OfThisProcess, raising=False)
    one, mesh = with_head("question", "splinter", dtype=torch.float32), cp_mesh()  # whose head looks for a token
    model = apply_cp(copy.deepcopy(one), mesh)
    assert_exact(errors_of(one, model, batch_for("question"), mesh), 1e-4)


@pytest.mark.ranks(2)
def test_a_copy_outlives_the_model_it_was_made_of():
    one, mesh = with_head("sequence", "llama"), cp_mesh()
    model = copy.deepcopy(apply_cp(copy.deepcopy(one), mesh))
    assert_exact(errors_of(one, model, batch_for("sequence"), mesh))


@pytest.mark.ranks(2)
def test_a_loss_that_shifts_by_itself_is_that_of_whole_sequences():
    """Older models shift in their forward and look at no `shift_labels`."""
    one, mesh = small("llama", 2), cp_mesh()

    def own_loss(logits, labels, **_):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    one.loss_function = own_loss
    model = apply_cp(copy.deepcopy(one), mesh)
    assert_exact(errors_of(one, model, batch_for("masked"), mesh))


@pytest.mark.ranks(2)
def test_a_mean_over_this_ranks_labels_may_have_none():
    one, mesh = with_head("token", "mistral"), cp_mesh()
    model, batch = apply_cp(copy.deepcopy(one), mesh), batch_for("token")
    batch["labels"][:, :4] = batch["labels"][:, 12:] = -100  # all that rank 0 has
    assert_exact(errors_of(one, model, batch, mesh))


@pytest.mark.ranks(2)
def test_every_type_computes_attention_in_the_dtype_of_autocast():
    ids = batch_for("masked")["input_ids"]
    for kind in ("p2p", "all_gather", "a2a"):
        one, mesh = small("llama", 2, dtype=torch.float32, attention="sdpa"), cp_mesh()
        model = apply_cp(copy.deepcopy(one), mesh, kind)
        exact = one(input_ids=ids, labels=ids, use_cache=False).loss.detach()
        with torch.autocast(device_type(), torch.bfloat16):
            expected = one(input_ids=ids, labels=ids, use_cache=False).loss
            loss = model(**shard_batch({"input_ids": ids, "labels": ids}, mesh)).loss
        expected.backward()
        loss.backward()
        tolerance = 2 * (expected.detach() - exact).abs() + 1e-3
        assert (averaged(loss) - exact).abs() < tolerance, kind
        for name, parameter in model.named_parameters():
            wanted = dict(one.named_parameters())[name].grad
            assert relative_error(averaged(parameter.grad), wanted, 1e-2) < 0.1, f"{kind}: {name}"
