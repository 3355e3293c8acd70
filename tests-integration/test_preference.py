"""Preference training (two forwards of a policy, two of a frozen copy) and `generate`, laid out, against one process.

torch does not deep-copy a model that FSDP2 has sharded: the reference is then a copy from before, laid out as well, or
the policy without its adapters.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import am_fsdp
import am_moe
import am_pipeline
import am_tp_plans
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import tiny

PLAIN = MixedPrecisionPolicy()
LAYOUTS = ["fsdp", "tp", "ep"]
ROWS, LENGTH = 4, 10


def lay_out(model, layout, **settings):
    """Over two ranks, with am-fsdp or am-moe."""
    if layout == "ep":
        meshes = am_moe.build_meshes(device_type(), dp_shard=2, ep=2)
        axes = {"dp_axis_names": ("dp_shard",), "ep_axis_name": "ep", "ep_shard_axis_names": ("ep_shard",)}
        am_moe.parallelize_model(model, *meshes, **axes)
        return model
    if layout == "plan":
        mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("tp",))
        return am_tp_plans.apply_plan(model, mesh, am_tp_plans.resolve_plan(model))
    shape = (2, 1) if layout == "fsdp" else (1, 2)
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
    return am_fsdp.fsdp2_strategy_parallelize(model, mesh, mp_policy=PLAIN, **settings)


def make(layout):
    return tiny("qwen3_moe" if layout == "ep" else "llama", layers=2)


def log_likelihood(model, ids):
    """Of the last half of each row, `(B,)`."""
    scores = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return scores.gather(2, ids[:, 1:, None])[:, LENGTH // 2 :, 0].sum(1)


def dpo_loss(policy, reference, chosen, rejected, beta=0.5):
    """Rafailov et al. 2023 (arXiv 2305.18290), equation 7."""
    with torch.no_grad():  # first: a policy without its adapters is another model while its graph waits
        before = log_likelihood(reference, chosen) - log_likelihood(reference, rejected)
    gained = log_likelihood(policy, chosen) - log_likelihood(policy, rejected)
    return -nn.functional.logsigmoid(beta * (gained - before)).mean()


@pytest.mark.parametrize(
    ("layout", "reference"),
    [
        ("fsdp", "copied before"),
        ("fsdp", "without adapters"),
        ("tp", "copied before"),
        ("tp", "without adapters"),
        ("ep", "copied before"),
        ("plan", "copied after"),
    ],
)
@pytest.mark.ranks(2, timeout=120)
def test_a_preference_loop_trains_as_on_one_process(layout, reference):
    peft = pytest.importorskip("peft") if reference == "without adapters" else None
    one = make(layout)
    if peft:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        one = peft.get_peft_model(one, config)
    policy = copy.deepcopy(one)
    lay_out(policy.get_base_model() if peft else policy, layout)
    if reference == "copied after":
        frozen = copy.deepcopy(policy)
    else:
        frozen = policy if peft else lay_out(copy.deepcopy(one), layout)
    frozen_one = one if peft else copy.deepcopy(one)
    batches = torch.randint(0, 60, (3, 2, ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(device_type())
    half = slice(ROWS // 2 * dist.get_rank(), ROWS // 2 * (dist.get_rank() + 1))
    for pairs in batches:
        loss = loss_of(one, frozen_one, *pairs, peft)
        loss.backward()
        mine = loss_of(policy, frozen, *(pairs[:, half] if layout in ("fsdp", "ep") else pairs), peft)
        mine.backward()
        mean = mine.detach().clone()
        dist.all_reduce(mean)
        assert_same(mean / 2, loss.detach(), 1e-8, "loss")
        assert_same(gradients(policy), gradients(one), 1e-8, "gradients")
        for model in (one, policy):
            trained = [p for p in model.parameters() if p.requires_grad]
            torch.optim.SGD(trained, lr=0.3).step()
            model.zero_grad()


@pytest.mark.ranks(2, timeout=120)
def test_adapters_that_are_turned_off_between_a_forward_and_its_backward_are_refused_not_lost():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("fsdp"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    lay_out(model.get_base_model(), "fsdp")
    ids = torch.ones(2, 4, dtype=torch.int64, device=device_type())
    model(ids, use_cache=False)
    with torch.no_grad(), pytest.raises(ValueError, match="requires_grad was set to False while it was gathered"):
        without_adapter(model, ids)


@pytest.mark.parametrize("layout", ["fsdp", "ep"])
@pytest.mark.ranks(2, timeout=120)
def test_adapters_that_a_trainer_adds_to_a_laid_out_model_are_refused_with_what_to_do(layout):
    peft = pytest.importorskip("peft")
    model = make(layout)
    lay_out(model, layout)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    ids = torch.ones(2, 4, dtype=torch.int64, device=device_type())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"lora_A.* were added to .* after it was laid out.*without a peft_config"):
            model(ids, use_cache=False)


def loss_of(policy, reference, chosen, rejected, peft):
    if not peft:
        return dpo_loss(policy, reference, chosen, rejected)
    return dpo_loss(policy, lambda ids, **more: without_adapter(policy, ids, **more), chosen, rejected)


def without_adapter(model, ids, **more):
    with model.disable_adapter():
        return model(ids, **more)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.ranks(2, timeout=120)
def test_a_laid_out_model_generates_what_one_process_does_and_trains_on(layout):
    one = make(layout)
    one.config.use_cache = True
    model = lay_out(copy.deepcopy(one), layout)
    mine = 0 if layout == "tp" else dist.get_rank()
    prompts = [torch.randint(0, 60, (2, 5 + rank), generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    prompts = [ids.to(device_type()) for ids in prompts]
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "use_cache": True}
    first = one.generate(prompts[0], do_sample=False, **settings)
    settings["eos_token_id"] = first[:, 7].tolist()  # some are done before others, and a rank before the other
    for sample in (False, True):
        torch.manual_seed(3)
        expected = one.eval().generate(prompts[mine], do_sample=sample, **settings)
        torch.manual_seed(3)
        found = model.eval().generate(prompts[mine], do_sample=sample, synced_gpus=True, **settings)
        assert torch.equal(found, expected), sample
    for each in (one, model):
        each.train()
    ids = torch.cat([prompts[0], prompts[1][:, :5]])
    for each, rows in ((one, ids), (model, ids if layout == "tp" else ids[2 * mine : 2 * mine + 2])):
        nn.functional.cross_entropy(each(rows, use_cache=False).logits.flatten(0, 1), rows.flatten()).backward()
    assert_same(gradients(model), gradients(one), 1e-8, "gradients after it")


@pytest.mark.ranks(2)
def test_what_cannot_generate_says_what_to_do():
    ids = torch.ones(1, 4, dtype=torch.int64, device=device_type())
    part = am_pipeline.pipeline_model(
        make("pp"),
        init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",)),
        microbatch_size=1,
        local_batch_size=2,
        loss_fn=lambda logits, labels: logits.sum(),
    )[1][0]
    with pytest.raises(RuntimeError, match=r"part of LlamaForCausalLM cannot generate: .* pipeline_parts=True"):
        part.generate(ids, max_new_tokens=2)
    context = am_moe.apply_cp(make("cp"), init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",)))
    with pytest.raises(RuntimeError, match=r"cannot generate under context parallelism.*save_hf_weights"):
        context.generate(ids, max_new_tokens=2)
    sequence = lay_out(make("tp"), "tp", sequence_parallel=True)
    with pytest.raises(
        RuntimeError, match=r"cannot generate while its sequence is sharded.*without sequence parallelism"
    ):
        sequence.generate(ids, max_new_tokens=2)
