"""What only some ranks use, be it experts, towers or anything at all, trains exactly or is refused on every rank."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe import apply_ep, apply_fsdp, parallelize_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.zoo import small


def data_mesh():
    return init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("dp",))


def zeros_for_none(model):
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.ranks(2)
def test_experts_that_are_modules_and_used_on_some_ranks_train_as_in_one_process(reshard):
    import transformers

    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=96, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=0,
        expert_capacity=64, router_jitter_noise=0.0, use_cache=False,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    one = copy.deepcopy(model)
    apply_fsdp(model, data_mesh(), False, False, reshard_after_forward=reshard)
    for step in range(2):
        batches = []
        for rank in range(2):
            generator = torch.Generator().manual_seed(10 * step + rank)
            ids = torch.randint(3, 96, (1, 2), generator=generator).expand(2, 2)  # two tokens: few experts
            batches.append({"input_ids": ids, "decoder_input_ids": ids})
        model(**batches[dist.get_rank()]).logits.square().mean().backward()
        used = []
        for batch in batches:
            mine = copy.deepcopy(one)
            mine(**batch).logits.square().mean().backward()
            used.append({n for n, p in mine.named_parameters() if p.grad is not None})
            for parameter, other in zip(one.parameters(), mine.parameters(), strict=True):
                if other.grad is not None:
                    parameter.grad = (0 if parameter.grad is None else parameter.grad) + other.grad / 2
        assert used[0] != used[1], "the ranks use different experts"
        assert_same(gradients(model), zeros_for_none(one), 1e-4, f"step {step}")
        model.zero_grad()
        one.zero_grad()


class Layer(nn.Module):
    """LongCat Flash's experts behind a router whose choice the ids say: 4 experts, larger ids mean the token."""

    def __init__(self):
        super().__init__()
        mlp = small("longcat_flash", layers=1, dtype=torch.float64).model.layers[0].mlp
        self.experts = mlp.experts
        self.router = nn.Linear(32, 32, dtype=torch.float64)

    def forward(self, x, ids):
        return x + self.experts(self.router(x), ids, torch.full(ids.shape, 0.5, dtype=x.dtype))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, ids):
        for layer in self.layers:
            x = layer(x, ids)
        return x


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("case", ["identity on one rank", "no tokens on one rank", "identity everywhere"])
@pytest.mark.ranks(2)
def test_a_rank_whose_tokens_choose_no_expert_trains_as_in_one_process(case, spread):
    torch.manual_seed(0)
    model = Stack()
    one = copy.deepcopy(model)
    if spread:
        apply_ep(model, init_device_mesh(device_type(), (2,), mesh_dim_names=("ep",)))
    apply_fsdp(model, data_mesh(), spread, False)
    inputs = []
    for rank in range(2):
        tokens = 0 if rank and case == "no tokens on one rank" else 6
        x = torch.randn(tokens, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        ids = torch.randint(0, 4, (tokens, 2), generator=torch.Generator().manual_seed(rank))
        inputs.append(
            (x.requires_grad_(), ids % 2 + 4 if case == "identity everywhere" or (rank and "identity" in case) else ids)
        )
    model(*inputs[dist.get_rank()]).square().sum().backward()
    for each in inputs:
        (one(*each).square().sum() / 2).backward()
    actual = gradients(model)
    # Rows of parameters beyond the last expert, which no token reads, are dropped where experts are spread.
    expected = {n: g[: actual[n].shape[0]] for n, g in zeros_for_none(one).items()}
    assert_same(actual, expected, 1e-10)


def llava_of_experts():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
        ),
        text_config=transformers.MixtralConfig(
            vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, use_cache=False,
        ),
        image_token_index=95, image_token_id=95,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).double()
    model.set_experts_implementation("eager")
    return model


def images_and_text(seed=0):
    """Two rows of an image and text, and two of text alone."""
    generator = torch.Generator().manual_seed(seed)
    text = {"input_ids": torch.randint(3, 90, (2, 8), generator=generator)}
    ids = torch.cat([torch.full((2, 4), 95), text["input_ids"]], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)}, text


def check_gradients(model, one):
    # A bias of keys changes no softmax: its gradient is nothing but rounding.
    expected = {n: p.grad for n, p in one.named_parameters() if p.grad is not None and "k_proj.bias" not in n}
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(actual) >= set(expected)
    assert_same({n: g for n, g in actual.items() if n in expected}, expected, 1e-5)


@pytest.mark.parametrize("layout", ["expert parallel", "replicas"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.ranks(4)
def test_images_on_some_ranks_train_as_in_one_process(layout, frozen):
    model = llava_of_experts()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and "language_model" not in name))
    one = copy.deepcopy(model)
    if layout == "replicas":
        world = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("replicas", "shards"))
        parallelize_model(model, world, None, dp_axis_names=("replicas", "shards"))
    else:
        world = init_device_mesh(device_type(), (4,), mesh_dim_names=("dp",))
        experts = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("copies", "ep"))
        parallelize_model(
            model, world, experts, dp_axis_names=("dp",), ep_axis_name="ep", ep_shard_axis_names=("copies",)
        )
    for step, with_images in enumerate([(3,), (0, 1), (), (0, 1, 2, 3), (1, 2)]):
        batches = [images_and_text(10 * step + rank)[0 if rank in with_images else 1] for rank in range(4)]
        model(**batches[dist.get_rank()]).logits.square().mean().backward()
        for batch in batches:
            (one(**batch).logits.square().mean() / 4).backward()
        check_gradients(model, one)
        model.zero_grad()
        one.zero_grad()
        with torch.no_grad():
            other_way = batches[3 - dist.get_rank()]
            assert_same({"": model(**other_way).logits}, {"": one(**other_way).logits}, 1e-5, "evaluation")
        tower = [n for n, p in model.named_parameters() if p.grad is not None and "vision" in n]
        assert not frozen or not tower


@pytest.mark.ranks(2)
def test_inputs_that_no_tower_takes_on_some_ranks_only_are_refused_on_every_rank_and_the_next_step_runs():
    model = llava_of_experts()
    one = copy.deepcopy(model)
    apply_fsdp(model, data_mesh(), False, False)
    images, text = images_and_text()

    def rows(batch):
        return {name: value[dist.get_rank() :][:1] for name, value in batch.items()}

    mask = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"given different inputs, such as .*attention_mask is given on some ranks"):
        model(**rows(text), **({"attention_mask": mask} if dist.get_rank() else {}))
    for batch in (images, text):
        model(**rows(batch)).logits.square().mean().backward()
        one(**batch).logits.square().mean().backward()
        check_gradients(model, one)
        model.zero_grad()
        one.zero_grad()
    # A layer that only one rank skips is seen before its collective.
    if dist.get_rank():
        del model.model.language_model.layers[1]
    with pytest.raises(ValueError, match="some ranks are at"):
        model(**rows(images if dist.get_rank() else text))
