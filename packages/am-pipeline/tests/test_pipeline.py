"""Training through a pipeline under a real process group gives what one process gives."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from am_pipeline import (
    build_pipeline_schedule,
    duplicate_parameters,
    pipeline_model,
    reset_pp_stage_shapes,
    scale_grads_by_divisor,
    split_model_into_stages,
)
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
MODELS = [("llama", False), ("qwen3", True), ("qwen3_moe", False), ("qwen3_moe", True)]


def build(model, schedule="1F1B", *, microbatch=1, batch=8, mesh=None, **settings):
    mesh = mesh or init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",))
    settings = {
        "dp_axis_names": (),
        "layers_per_stage": None,
        "pipeline_parallel_schedule_csv": None,
        "loss_fn": next_token_loss,
        "scale_grads": True,
    } | settings
    return pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        pipeline_parallel_schedule=schedule,
        microbatch_size=microbatch,
        local_batch_size=batch,
        device=torch.device(device_type()),
        **settings,
    )


def run(built, ids, labels):
    schedule, _, first, last, _ = built
    losses: list = []
    arguments = (ids,) if first else ()
    logits = schedule.step(*arguments, target=labels if last else None, losses=losses)
    return logits, torch.stack(losses).mean() if last else None


class Counted(TorchDispatchMode):
    """The names of the operators that ran; torch's CommDebugMode loses its place when microbatches interleave."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def shard_layers(model, world_mesh, moe_mesh, **axes):
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(model, mesh=world_mesh["dp"])


def one_process(model, ids, labels):
    logits = model(ids, use_cache=False).logits
    loss = next_token_loss(logits, labels)
    loss.backward()
    return logits, loss


@pytest.mark.parametrize(
    ("schedule", "family", "tied"),
    [(schedule, *MODELS[(place + turn) % 4]) for place, schedule in enumerate(SCHEDULES) for turn in (0, 1)],
)
@pytest.mark.ranks(2)
def test_every_schedule_gives_the_logits_loss_and_gradients_of_one_process(schedule, family, tied):
    model = tiny(family, tied=tied)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(8, 12)
    expected, expected_loss = one_process(whole, ids, labels)
    built = build(model, schedule)
    for _ in range(2):  # the second step reuses buffers
        for part in built[1]:
            part.zero_grad()
        logits, loss = run(built, ids, labels)
    if built[3]:
        assert_same(logits, expected, 1e-12, "logits")
        assert_same(loss, expected_loss, 1e-12, "loss")
    for part in built[1]:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(4)
def test_tied_weights_stay_one_parameter_over_four_stages_and_clipped_steps():
    model = tiny("qwen3", tied=True)
    whole = copy.deepcopy(model)
    built = build(model, "1F1B")
    part = built[1][0]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (part, whole)]
    twins = {id(p) for p in duplicate_parameters(built[4])}
    assert len(twins) == int(built[3]), "only the last stage holds a second copy"
    for step in range(3):
        ids, labels = token_batch(8, 12, seed=step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        run(built, ids, labels)
        one_process(whole, ids, labels)
        squares = sum(p.grad.square().sum() for p in part.parameters() if id(p) not in twins)
        dist.all_reduce(squares)
        expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        assert_same(squares.sqrt(), expected, 1e-10, "gradient norm")
        for p in part.parameters():
            p.grad.mul_(0.1 / (squares.sqrt() + 1e-6))
        for optimizer in optimizers:
            optimizer.step()
    weights = dict(whole.named_parameters(remove_duplicate=False))
    assert_same(dict(part.named_parameters()), weights, 1e-9, "weights after three steps")


@pytest.mark.ranks(2)
def test_a_v_schedule_updates_both_copies_of_a_tied_weight_on_one_rank():
    model = tiny("qwen3", tied=True)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(8, 12)
    built = build(model, "ZBVZeroBubble")
    run(built, ids, labels)
    one_process(whole, ids, labels)
    if built[2]:
        embedding = built[1][0].model.embed_tokens.weight
        head = built[1][1].lm_head.weight
        assert embedding is not head
        assert torch.equal(embedding.grad, head.grad)
        assert_same(head.grad, whole.lm_head.weight.grad, 1e-10)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.ranks(2)
def test_a_batch_of_another_length_just_works(known):
    model = tiny("llama")
    whole = copy.deepcopy(model)
    built = build(model, "1F1B", seq_len=12 if known else None)
    for length in (12, 20, 7, 12):
        ids, labels = token_batch(8, length)
        for part in (*built[1], whole):
            part.zero_grad()
        logits, _ = run(built, ids, labels)
        expected, _ = one_process(whole, ids, labels)
        if built[3]:
            assert_same(logits, expected, 1e-12, f"logits at length {length}")
        assert_same(gradients(built[1][0]), gradients(whole), 1e-10, f"gradients at length {length}")


@pytest.mark.ranks(2)
def test_shapes_can_be_reset_by_hand():
    built = build(tiny("llama"), "GPipe", seq_len=12)
    reset_pp_stage_shapes(built[0], built[4], None, microbatch_size=1, seq_len=16)
    logits, _ = run(built, *token_batch(8, 16))
    if built[3]:
        assert logits.shape == (8, 16, 96)
    with pytest.raises(ValueError, match="must be positive"):
        reset_pp_stage_shapes(built[0], built[4], None, microbatch_size=1, seq_len=0)


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
@pytest.mark.ranks(2)
def test_evaluation_gives_the_logits_and_no_gradients_between_training_steps(schedule):
    model = tiny("qwen3", tied=True)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(8, 12)
    expected, _ = one_process(whole, ids, labels)
    built = build(model, schedule)
    run(built, ids, labels)
    for part in built[1]:
        part.zero_grad()
    logits = built[0].eval(*((ids,) if built[2] else ()), target=labels if built[3] else None)
    if built[3]:
        assert_same(logits, expected, 1e-12, "logits")
    assert all(p.grad is None for part in built[1] for p in part.parameters())
    run(built, ids, labels)
    for part in built[1]:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients after evaluation")


@pytest.mark.ranks(2)
def test_a_padding_mask_given_to_every_stage_counts_on_every_stage():
    model = tiny("llama")
    whole = copy.deepcopy(model)
    ids, labels = token_batch(4, 12)
    mask = torch.ones(4, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    mask[3, 10:] = 0
    expected = whole(ids, attention_mask=mask, use_cache=False).logits
    next_token_loss(expected, labels).backward()
    schedule, parts, first, last, _ = build(model, "GPipe", batch=4)
    logits = schedule.step(*((ids,) if first else ()), attention_mask=mask, target=labels if last else None)
    if last:
        assert_same(logits, expected, 1e-12, "logits")
    assert_same(gradients(parts[0]), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_a_summed_loss_is_scaled_by_a_divisor():
    def summed(logits, labels):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    model = tiny("llama", tied=True)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(8, 12)
    one_process(whole, ids, labels)
    built = build(model, "1F1B", loss_fn=summed, scale_grads=False)
    run(built, ids, labels)
    scale_grads_by_divisor(built[4], ids.numel())
    # The model computes its softmax in float32, which rounds a sum and a mean differently.
    assert_same(gradients(built[1][0]), gradients(whole), 1e-6, "gradients")
    with pytest.raises(ValueError, match="divisor must be positive"):
        scale_grads_by_divisor(built[4], 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(4)
def test_parts_sharded_over_data_ranks_equal_one_process_with_tied_weights(schedule):
    model = tiny("qwen3", tied=True)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))

    ids, labels = token_batch(16, 12)
    one_process(whole, ids, labels)
    built = build(model, schedule, mesh=mesh, parallelize_fn=shard_layers, dp_axis_names=("dp",))
    share = slice(8 * mesh.get_local_rank("dp"), 8 * mesh.get_local_rank("dp") + 8)
    run(built, ids[share], labels[share])
    for part in built[1]:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients")


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS"])
@pytest.mark.ranks(4)
def test_gradients_reduced_after_every_microbatch_are_the_same(schedule):
    model = tiny("qwen3", tied=True)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    ids, labels = token_batch(16, 12)
    one_process(whole, ids, labels)
    built = build(model, schedule, mesh=mesh, parallelize_fn=shard_layers, reduce_grads="microbatch")
    share = slice(8 * mesh.get_local_rank("dp"), 8 * mesh.get_local_rank("dp") + 8)
    for _ in range(2):
        for part in built[1]:
            part.zero_grad()
        with Counted() as counted:
            run(built, ids[share], labels[share])
    for part in built[1]:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients")
    layers = sum(1 for part in built[1] for m in part.model.layers if isinstance(m, FSDPModule))
    units = layers + sum(stage.is_first or stage.is_last for stage in built[4])  # those have more than layers
    assert counted.names.count("c10d::_reduce_scatter_base_") == 8 * units


@pytest.mark.ranks(2)
def test_what_cannot_run_with_a_split_backward_is_refused_on_every_rank():
    with pytest.raises(ValueError, match="splits the backward reduces gradients once"):
        build(tiny("llama"), "ZBVZeroBubble", reduce_grads="microbatch")
    with pytest.raises(ValueError, match="reduce_grads must be 'step' or 'microbatch'"):
        build(tiny("llama"), "1F1B", reduce_grads="layer")

    def compile_layers(model, *args, **axes):
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")

    with pytest.raises(ValueError, match=r"torch cannot do through compiled modules \(model\.layers"):
        build(tiny("llama"), "DualPipeV", parallelize_fn=compile_layers)


@pytest.mark.ranks(2)
def test_compiled_layers_train():
    def compile_layers(model, *args, **axes):
        for layer in model.model.layers:
            if any(True for _ in layer.parameters()):
                layer.compile(backend="aot_eager")

    model = tiny("llama")
    whole = copy.deepcopy(model)
    ids, labels = token_batch(8, 12)
    one_process(whole, ids, labels)
    built = build(model, "1F1B", parallelize_fn=compile_layers)
    run(built, ids, labels)
    assert_same(gradients(built[1][0]), gradients(whole), 1e-9, "gradients")


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.ranks(2)
def test_a_frozen_tied_embedding_stays_as_it_is(schedule):
    model = tiny("qwen3", tied=True)
    model.model.embed_tokens.weight.requires_grad_(False)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(8, 12)
    one_process(whole, ids, labels)
    built = build(model, schedule)
    run(built, ids, labels)
    for part in built[1]:
        mine = gradients(part)
        assert not any("embed_tokens" in name or "lm_head" in name for name in mine)
        assert_same(mine, gradients(whole), 1e-10, "gradients")


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.ranks(2)
def test_adapters_train_on_a_frozen_model_with_tied_embeddings(schedule):
    from peft import LoraConfig, get_peft_model

    def adapted():
        model = tiny("qwen3", tied=True)
        settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], init_lora_weights=False)
        torch.manual_seed(1)
        return get_peft_model(model, settings).base_model.model

    model, whole = adapted(), adapted()
    ids, labels = token_batch(8, 12)
    one_process(whole, ids, labels)
    built = build(model, schedule)
    run(built, ids, labels)
    expected = gradients(whole)
    assert any("lora_embedding_A" in name for name in expected)
    for part in built[1]:
        assert_same(gradients(part), expected, 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_a_checkpoint_of_all_stages_has_one_copy_of_a_tied_weight():
    model = tiny("qwen3", tied=True)
    names = set(model.state_dict())
    built = build(model, "1F1B")
    mine = {id(p): name for name, p in built[1][0].named_parameters()}
    owned = set(mine.values()) - {mine[id(p)] for p in duplicate_parameters(built[4])}
    everyone: list = [None, None]
    dist.all_gather_object(everyone, sorted(owned))
    saved = [name for names in everyone for name in names]
    assert len(saved) == len(set(saved))
    assert set(saved) == names - {"lm_head.weight"}


@pytest.mark.ranks(2)
def test_a_schedule_file_runs_without_a_schedule_name(tmp_path):
    path = tmp_path / "gpipe.csv"
    if dist.get_rank() == 0:
        rows = (["0F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1B1"])
        path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    dist.barrier()
    model = tiny("llama", tied=True)
    whole = copy.deepcopy(model)
    ids, labels = token_batch(2, 12)
    one_process(whole, ids, labels)
    built = build(model, None, batch=2, pipeline_parallel_schedule_csv=str(path))
    run(built, ids, labels)
    assert_same(gradients(built[1][0]), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_wrong_calls_are_refused_on_every_rank_before_anything_is_sent():
    built = build(tiny("llama"), "1F1B")
    ids, labels = token_batch(8, 12)
    with pytest.raises(ValueError, match=r"must call step\(ids"):
        built[0].step(target=labels if built[3] else None)
    with pytest.raises(ValueError, match="target=labels"):
        built[0].step(*((ids,) if built[2] else ()))
    with pytest.raises(ValueError, match=r"4 sequences, .* local_batch_size=8"):
        run(built, ids[:4], labels[:4])
    run(built, ids, labels)  # and the pipeline still works


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "2F2B"}, "unknown pipeline schedule '2F2B'"),
        ({"schedule": None}, "give pipeline_parallel_schedule"),
        ({"batch": 7, "microbatch": 2}, "local_batch_size=7 .* multiple of microbatch_size=2"),
        ({"layers_per_stage": 0}, "layers_per_stage must be at least 1"),
        ({"layers_per_stage": 1}, "one stage per rank"),
        ({"schedule": "Interleaved1F1B", "layers_per_stage": 2}, "at least two"),
        ({"module_fqns_per_model_part": [["model"]]}, "1 stages; Schedule1F1B needs exactly 2"),
    ],
)
@pytest.mark.ranks(2)
def test_wrong_requests_are_refused_on_every_rank(settings, words):
    with pytest.raises(ValueError, match=words):
        build(tiny("llama"), **settings)


@pytest.mark.ranks(2)
def test_a_mesh_without_the_axis_is_refused():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("stages",))
    with pytest.raises(ValueError, match="no axis 'pp'; it has"):
        build(tiny("llama"), mesh=mesh)


@pytest.mark.ranks(2)
def test_copies_of_a_tied_weight_with_different_layouts_are_refused():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("pp",))
    stages, parts = split_model_into_stages(tiny("qwen3", tied=True), mesh, "pp", "1F1B", torch.device(device_type()))
    if dist.get_rank() == 1:
        parts[0].lm_head.weight = torch.nn.Parameter(parts[0].lm_head.weight[:90].detach())
    schedule = build_pipeline_schedule(None, "1F1B", 1, 8, stages, next_token_loss)
    ids, labels = token_batch(8, 12)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight .* lm_head.weight .* one parameter"):
        schedule.step(*((ids,) if dist.get_rank() == 0 else ()), target=labels if dist.get_rank() else None)
