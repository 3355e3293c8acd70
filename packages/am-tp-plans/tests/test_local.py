"""Activations are plain tensors: no DTensor is dispatched, copies are models of their own, sums are made together."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.distributed as dist
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.phi3.modeling_phi3
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small
from am_tp_plans import apply_plan, infer_plan, keep_logits_sharded, resolve_plan, vocab_parallel_cross_entropy

SEQUENCE = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])


def axis():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("tp",))


def built(family):
    return small("gpt2", dtype=torch.float64).eval() if family == "gpt2" else tiny(family, num_key_value_heads=4)


def sharded(model, sequence_parallel=False, mesh=None):
    if type(model).__name__.startswith("GPT2"):
        plan = infer_plan(model)
    else:
        plan = resolve_plan(model, sequence_parallel=sequence_parallel)
    return apply_plan(model, mesh or axis(), plan)


def step(model, seed=0, **options):
    ids, labels = token_batch(2, 12, vocab_size=60, seed=seed)
    logits = model(ids, use_cache=False, **options).logits
    next_token_loss(logits, labels).backward()
    return logits


class Seen(TorchDispatchMode):
    """Operations on DTensors, and the sizes of all-reduces."""

    def __init__(self):
        super().__init__()
        self.dtensors, self.sums = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            self.dtensors.append(func)
            return NotImplemented
        if func._schema.name == "_c10d_functional::all_reduce":
            self.sums.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@SEQUENCE
@pytest.mark.parametrize("family", ["qwen3", "phi3", "qwen3_moe", "gpt2"])
@pytest.mark.ranks(2)
def test_no_dtensor_is_dispatched_in_a_step_but_to_set_each_parameters_gradient(family, sequence_parallel):
    if family == "gpt2" and sequence_parallel:
        pytest.skip("inferred plans get sequence parallelism elsewhere")
    model = sharded(built(family), sequence_parallel)
    step(model)
    model.zero_grad()
    with Seen() as seen:
        step(model)
    sets = [func for func in seen.dtensors if func is torch.ops.aten.detach.default]
    assert len(sets) <= sum(isinstance(p, DTensor) for p in model.parameters()), "what `.grad` is set with"
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(seen.dtensors) - len(sets) == tied, "a tied weight adds the gradients of its two uses"


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3", "qwen3_moe"])
@SEQUENCE
@pytest.mark.ranks(2)
def test_a_deep_copy_and_a_pickled_model_compute_with_their_own_weights(family, sequence_parallel):
    if family == "gpt2" and sequence_parallel:
        pytest.skip("inferred plans get sequence parallelism elsewhere")
    whole = built(family)
    model = sharded(copy.deepcopy(whole), sequence_parallel)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)  # the original moves away; the copy must not follow
        reference = copy.deepcopy(whole)
        assert_same(step(twin), step(reference), 1e-6, "logits")
        assert_same(gradients(twin), gradients(reference), 1e-6, "gradients")
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), reference.parameters(), strict=True):
                mine.mul_(0.9)
                theirs.mul_(0.9)
        assert_same(step(twin, seed=1), step(reference, seed=1), 1e-6, "logits of changed weights")


@pytest.mark.ranks(2)
def test_gradients_of_whole_parameters_are_summed_in_one_go_per_backward():
    model = sharded(tiny("qwen3", num_key_value_heads=4), sequence_parallel=True)
    whole = tiny("qwen3", num_key_value_heads=4)
    shares = sum(p.numel() for name, p in whole.named_parameters() if "norm" in name)
    ids, labels = token_batch(2, 12)
    for microbatch in range(2):
        loss = next_token_loss(model(ids, use_cache=False).logits, labels)
        with Seen() as seen:
            loss.backward()
        assert seen.sums == [shares], f"all the norms' gradients of microbatch {microbatch} together, and nothing else"
        next_token_loss(whole(ids, use_cache=False).logits, labels).backward()
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients of two microbatches")

    norm = model.model.layers[1].input_layernorm.weight
    mine = torch.autograd.grad(next_token_loss(model(ids, use_cache=False).logits, labels), norm)[0]
    theirs = whole.model.layers[1].input_layernorm.weight
    expected = torch.autograd.grad(next_token_loss(whole(ids, use_cache=False).logits, labels), theirs)[0]
    assert_same(mine, expected, 1e-10, "gradient of one parameter alone")
    seen_by_hook = []
    norm.register_hook(lambda gradient: seen_by_hook.append(gradient.full_tensor()))
    next_token_loss(model(ids, use_cache=False).logits, labels).backward()
    assert_same(seen_by_hook[0], expected, 1e-10, "what a hook of the parameter sees")


def keep_products(_ctx, operator, *_args, **_kwargs):
    kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


RECOMPUTED = {
    "all": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, keep_products),
    },
}
# A rank has a share of the tokens in what is frozen and in what is not: adapters leave all but themselves frozen.
FROZEN = {
    "nothing": (),
    "norms of layers": ("input_layernorm", "q_norm"),
    "a layer": ("layers.0.",),
    "all but products": ("norm", "embed"),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.ranks(2)
def test_gradients_are_whole_with_recomputed_layers(recomputed, frozen):
    whole = tiny("qwen3", num_key_value_heads=4).train()
    for name, parameter in whole.named_parameters():
        parameter.requires_grad = not any(word in name for word in FROZEN[frozen])
    model = sharded(copy.deepcopy(whole), sequence_parallel=True)
    for each in (model, whole):  # a reentrant checkpoint has gradients only where what enters it does
        each.enable_input_require_grads()
    model.gradient_checkpointing_enable(RECOMPUTED[recomputed])
    for seed in range(2):
        assert_same(step(model, seed), step(whole, seed), 1e-10, "logits")
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("units", ["layers", "layers and root", "root"])
@pytest.mark.ranks(4)
def test_gradients_are_whole_where_fsdp_holds_the_model(units, reshard):
    whole = tiny("qwen3", num_key_value_heads=4)
    model = copy.deepcopy(whole)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "tp"))
    sharded(model, sequence_parallel=True, mesh=mesh["tp"])
    for layer in model.model.layers if "layers" in units else ():
        fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=reshard)
    if "root" in units:
        fully_shard(model, mesh=mesh["dp"], reshard_after_forward=reshard)
    with torch.no_grad():
        model(token_batch(2, 12)[0], use_cache=False)
    for seed in range(2):
        assert_same(step(model, seed), step(whole, seed), 1e-10, "logits")
    for name, parameter in whole.named_parameters():
        mine = model.get_parameter(name)
        if mine.device_mesh.ndim == 2 or "layers" not in units:
            assert_same(mine.grad, parameter.grad, 1e-10, name)


@pytest.mark.ranks(2)
def test_a_gradient_of_a_gradient_is_that_of_one_process():
    whole = tiny("llama", num_key_value_heads=4, layers=2)
    model = sharded(copy.deepcopy(whole), sequence_parallel=True)
    ids, labels = token_batch(2, 12)
    found = []
    for each in (model, whole):
        each.set_attn_implementation("eager")
        loss = next_token_loss(each(ids, use_cache=False).logits, labels)
        first = torch.autograd.grad(loss, list(each.parameters()), create_graph=True)
        size = sum((g.full_tensor() if isinstance(g, DTensor) else g).square().sum() for g in first)
        found.append(torch.autograd.grad(size, list(each.parameters())))
    for (name, _), mine, theirs in zip(whole.named_parameters(), *found, strict=True):
        assert_same(mine, theirs, 1e-8, name)


@pytest.mark.ranks(2)
def test_the_second_derivative_of_the_loss_over_shards_is_refused():
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("ids", [[1, 96], [500, 3], [-3, 2]], ids=str)
@pytest.mark.ranks(2)
def test_ids_outside_the_vocabulary_raise_what_one_process_raises_on_every_rank(ids):
    whole = tiny("llama", layers=1)
    model = sharded(copy.deepcopy(whole))
    messages = []
    for each in (whole, model):
        with pytest.raises(IndexError) as error:
            each(torch.tensor([ids]), use_cache=False)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@SEQUENCE
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.ranks(4)
def test_a_vocabulary_that_does_not_divide_is_sharded_in_embedding_head_and_loss(tied, sequence_parallel):
    whole = tiny("llama", vocab_size=97, num_key_value_heads=4, tied=tied)
    ids, labels = token_batch(2, 12, vocab_size=97)
    for keep in (False, True):
        model, one = copy.deepcopy(whole), copy.deepcopy(whole)
        plan = resolve_plan(model, sequence_parallel=sequence_parallel)
        apply_plan(model, axis(), keep_logits_sharded(model, plan) if keep else plan)
        assert model.lm_head.weight.to_local().shape[0] == (25 if dist.get_rank() < 3 else 22)
        logits = model(ids, use_cache=False).logits
        assert isinstance(logits, DTensor) == keep
        expected = one(ids, use_cache=False).logits
        assert_same(logits, expected, 1e-10, "logits")
        for each in (logits, expected):
            vocab_parallel_cross_entropy(
                each[:, :-1] if not keep else each, labels[:, 1:] if not keep else labels
            ).backward()
        assert_same(gradients(model), gradients(one), 1e-6, "gradients")
