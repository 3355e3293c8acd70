"""What goes wrong on one rank ends the step on all of them, with that rank's words, and the next step runs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from am_pipeline import pipeline_model
from am_pipeline.step import failure
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
COUNT = 4


def build(model, schedule="1F1B", *, mesh=None, loss_fn=next_token_loss, **settings):
    return pipeline_model(
        model,
        mesh or init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",)),
        None,
        pp_axis_name="pp",
        dp_axis_names=(),
        layers_per_stage=None,
        pipeline_parallel_schedule_csv=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=1,
        local_batch_size=COUNT,
        device=torch.device(device_type()),
        loss_fn=loss_fn,
        scale_grads=True,
        **settings,
    )


def run(built, ids, labels, kind="step", **settings):
    call = getattr(built[0], kind)
    return call(*((ids,) if built[2] else ()), target=labels if built[3] else None, **settings)


class Trouble:
    """Fails in the forward or the backward of one layer, or in the loss, from the given microbatch on."""

    def __init__(self):
        self.place, self.after, self.seen = None, 0, 0

    def set(self, place, after):
        self.place, self.after, self.seen = place, after, 0

    def at(self, place):
        if place == self.place:
            self.seen += 1
            if self.seen > self.after:
                raise KeyError(f"trouble in {place}")

    def install(self, parts):
        for part in parts:
            for index, layer in enumerate(part.model.layers):
                if any(True for _ in layer.parameters()):
                    layer.register_forward_pre_hook(lambda *_, index=index: self.at(f"forward {index}"))
                    layer.mlp.register_forward_hook(self._watch(index))

    def _watch(self, index):
        def watch(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: self.at(f"backward {index}"))

        return watch

    def loss(self, logits, labels):
        self.at("loss")
        return next_token_loss(logits, labels)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.ranks(2, timeout=60)
def test_an_error_in_a_stage_or_in_the_loss_ends_the_step_on_every_rank(schedule):
    trouble = Trouble()
    whole = tiny("qwen3", tied=True)
    ids, labels = token_batch(COUNT, 12)
    for i, t in zip(ids.chunk(COUNT), labels.chunk(COUNT), strict=True):
        (next_token_loss(whole(i, use_cache=False).logits, t) / COUNT).backward()
    expected = {name: 2 * gradient for name, gradient in gradients(whole).items()}
    built = build(tiny("qwen3", tied=True), schedule, loss_fn=trouble.loss)
    trouble.install(built[1])
    run(built, ids, labels)
    began = time.monotonic()
    for place in ("forward 0", "forward 3", "forward 1", "backward 3", "backward 0", "backward 2", "loss"):
        for after in (0, 1, COUNT - 1):
            before = {p: (p.grad, p.grad.clone()) for part in built[1] for p in part.parameters()}
            trouble.set(place, after)
            losses = ["untouched"]
            with pytest.raises(RuntimeError, match=rf"rank \d, stage \d, .* microbatch \d: KeyError.*{place}") as error:
                run(built, ids, labels, losses=losses)
            assert (error.value.__cause__ is not None) == (trouble.seen > after), "the exception where it happened"
            assert losses == ["untouched"]
            assert all(p.grad is same and torch.equal(same, values) for p, (same, values) in before.items())
    trouble.set("forward 3", 0)
    with pytest.raises(RuntimeError, match="KeyError"):
        run(built, ids, labels, kind="eval")
    assert time.monotonic() - began < 30
    trouble.set(None, 0)
    logits = run(built, ids, labels, kind="eval")
    if built[3]:
        assert_same(logits, whole(ids, use_cache=False).logits, 1e-12, "logits after failed steps")
    run(built, ids, labels)
    for part in built[1]:
        assert_same(gradients(part), expected, 1e-10, "gradients after failed steps")


@pytest.mark.ranks(4, timeout=90)
def test_an_error_in_the_loss_ends_the_step_with_sharded_parts_and_one_in_a_part_is_raised_at_once():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    trouble = Trouble()

    def shard(model, world_mesh, moe_mesh, **axes):
        for layer in model.model.layers:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=world_mesh["dp"])
        fully_shard(model, mesh=world_mesh["dp"])

    ids, labels = token_batch(COUNT, 12)
    for schedule in ("1F1B", "InterleavedZeroBubble"):
        whole = tiny("llama")
        for i, t in zip(ids.chunk(COUNT), labels.chunk(COUNT), strict=True):
            (next_token_loss(whole(i, use_cache=False).logits, t) / COUNT).backward()
        trouble.set(None, 0)
        built = build(tiny("llama"), schedule, mesh=mesh, loss_fn=trouble.loss, parallelize_fn=shard)
        one = mesh.get_local_rank("dp") == 0
        if one:
            trouble.set("loss", 1)  # of one pipeline alone
        with pytest.raises(RuntimeError, match=r"rank \d, stage \d, loss of microbatch 1: KeyError"):
            run(built, ids, labels)
        with pytest.raises(ValueError, match="target=labels"):
            run(built, ids, None if one else labels)
        assert all(p.grad is None for part in built[1] for p in part.parameters())
        trouble.set(None, 0)
        run(built, ids, labels)
        for part in built[1]:
            assert_same(gradients(part), gradients(whole), 1e-10, "gradients")
    stage = built[4][0]
    stage.failure = failure.StepFailure()
    if stage.is_first:
        with pytest.raises(RuntimeError, match="failed to run forward"):
            stage.forward_one_chunk(0, ("no ids",), {})
        assert stage.failure.error is None, "data ranks wait for this one: it does not go on"


def shard_layers(model, world_mesh, moe_mesh, **axes):
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(model, mesh=world_mesh["dp"])


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe"])
@pytest.mark.ranks(4, timeout=120)
def test_an_error_in_a_part_that_fsdp2_shards_ends_the_step_on_every_rank(schedule):
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    trouble, whole = Trouble(), tiny("llama")
    ids, labels = token_batch(COUNT, 12)
    for i, t in zip(ids.chunk(COUNT), labels.chunk(COUNT), strict=True):
        (next_token_loss(whole(i, use_cache=False).logits, t) / COUNT).backward()
    built = build(tiny("llama"), schedule, loss_fn=trouble.loss, mesh=mesh, parallelize_fn=shard_layers)
    trouble.install(built[1])
    assert not built[4][0].can_keep_company, "before a step that went well"
    run(built, ids, labels)
    run(built, ids, labels, kind="eval")
    for part in built[1]:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients")
        part.zero_grad()
    began = time.monotonic()
    for place in ("forward 0", "forward 1", "forward 3", "backward 0", "backward 1", "backward 2", "loss"):
        for after in (0, 1, COUNT - 1):
            trouble.set(place if mesh.get_local_rank("dp") == 1 else None, after)  # in one pipeline, on one rank
            words = rf"^the pipeline step failed: rank \d, stage \d, .* microbatch \d: KeyError.*{place}'?\"?$"
            with pytest.raises(RuntimeError, match=words) as error:
                run(built, ids, labels)
            assert (error.value.__cause__ is not None) == (trouble.seen > after), "the exception where it happened"
            assert all(p.grad is None for part in built[1] for p in part.parameters())
    trouble.set("forward 3" if mesh.get_local_rank("dp") == 1 else None, 0)
    with pytest.raises(RuntimeError, match=r"rank 3, stage 1, forward of microbatch 0: KeyError"):
        run(built, ids, labels, kind="eval")
    assert time.monotonic() - began < 60
    trouble.set(None, 0)
    run(built, ids, labels)
    for part in built[1]:
        assert_same(gradients(part), gradients(whole), 1e-10, "gradients after failed steps")


def sums_in_a_layer(model, world_mesh, moe_mesh, **axes):
    shard_layers(model, world_mesh, moe_mesh)
    group = world_mesh["dp"].get_group()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: dist.all_reduce(torch.ones(1), group=group))


@pytest.mark.parametrize(
    ("schedule", "parallelize_fn", "settings"),
    [
        ("1F1B", sums_in_a_layer, {}),
        ("1F1B", shard_layers, {"reduce_grads": "microbatch"}),
        ("Interleaved1F1B", shard_layers, {}),
    ],
)
@pytest.mark.ranks(4, timeout=90)
def test_ranks_that_wait_in_unknown_ways_are_not_kept_company(schedule, parallelize_fn, settings):
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    built = build(tiny("llama"), schedule, mesh=mesh, parallelize_fn=parallelize_fn, **settings)
    for _ in range(2):
        run(built, *token_batch(COUNT, 12))
        assert not any(stage.can_keep_company for stage in built[4])


@pytest.mark.ranks(2)
def test_wrong_calls_are_refused_on_every_rank_and_change_nothing():
    built = build(tiny("llama"))
    ids, labels = token_batch(COUNT, 12)
    first, last = built[2], built[3]
    run(built, ids, labels)
    before = gradients(built[1][0])
    wrong = [
        (ValueError, r"must call step\(ids", {"args": ()}),
        (ValueError, r"must call step\(ids", {"args": ([1, 2],)}),
        (ValueError, "6 sequences, .* local_batch_size=4, or another multiple of its 4 microbatches", {"batch": 6}),
        (ValueError, "the batch has 0 sequences", {"batch": 0}),
        (ValueError, "target=labels", {"target": None}),
        (ValueError, "the target has 3 rows, but the batch has 4", {"target": labels[:3]}),
        (ValueError, r"different first dims: .*target\['b'\]", {"target": {"a": labels, "b": [labels[:2]]}}),
        (ValueError, "no tensor with a row", {"target": {"temperature": 1.0}}),
        (TypeError, r"target\[1\] is a object", {"target": (labels, object())}),
        (TypeError, "losses must be a list, got tuple", {"losses": ()}),
        (TypeError, "'mask' is a set", {"mask": {1}}),
        (ValueError, "labels= makes the model compute a loss .* give the labels as target=", {"labels": labels}),
        (ValueError, "return_loss= makes the model", {"return_loss": True}),
    ]
    for kind, words, how in wrong:
        how = dict(how)
        args = how.pop("args", (token_batch(how.pop("batch"), 12)[0],) if "batch" in how else (ids,))
        target = how.pop("target", labels)
        mine = {"losses": how.pop("losses")} if "losses" in how and last else {}
        how.pop("losses", None)
        mine |= how if first else {}
        with pytest.raises(kind, match=words):
            built[0].step(*(args if first else ()), target=target if last else None, **mine)
        assert_same(gradients(built[1][0]), before, 0, "gradients")
    with pytest.raises(RuntimeError, match=r"call eval\(\) instead"), torch.set_grad_enabled(not last):
        run(built, ids, labels)  # of one rank alone
    run(built, *token_batch(COUNT, 9))


@pytest.mark.ranks(2)
def test_hosts_vote_in_a_group_of_their_own_where_messages_go_through_a_device(monkeypatch):
    pair = dist.new_group([0, 1])
    assert failure.host_group(pair) is pair, "it takes tensors on the CPU"
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    hosts = failure.host_group(pair)
    assert hosts is not pair
    assert dist.get_backend(hosts) == "gloo"
    mine = failure.StepFailure()
    failure.vote(mine, [hosts])
    if dist.get_rank():
        mine.record("stage 1", OSError("no disk"))
    with pytest.raises(RuntimeError, match="rank 1, stage 1: OSError: no disk"):
        failure.vote(mine, [hosts])


@pytest.mark.ranks(2)
def test_what_a_loss_returns_is_checked_and_long_words_are_cut():
    ids, labels = token_batch(COUNT, 12)
    for result, words in ((lambda o: o, r"a tensor of shape \(1, 12, 96\)"), (lambda o: None, "None")):
        built = build(tiny("llama"), loss_fn=lambda o, t, result=result: result(o))
        with pytest.raises(RuntimeError, match=f"TypeError: loss_fn must return a scalar tensor, got {words}"):
            run(built, ids, labels)

    def long(output, target):
        raise ValueError("é" * 3000)

    with pytest.raises(RuntimeError, match=r"ValueError: é{400,600}$"):
        run(build(tiny("llama"), loss_fn=long), ids, labels)


@pytest.mark.ranks(2)
def test_inputs_that_take_many_words_to_describe_are_shared():
    built = build(tiny("llama"))
    ids, labels = token_batch(COUNT, 12)
    mask = torch.ones(COUNT, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    expected = tiny("llama")(ids, attention_mask=mask, use_cache=False).logits
    many = {f"an_input_that_the_model_does_not_read_{i}": "word" * 10 for i in range(40)}
    for more in ({}, many):
        logits = run(built, ids, labels, **(more | {"attention_mask": mask} if built[2] else {}))
        if built[3]:
            assert_same(logits, expected, 1e-12, "logits")


class Normed(torch.nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.norm = inner, torch.nn.BatchNorm1d(width, dtype=torch.float64)

    def forward(self, x):
        return self.norm(self.inner(x).mT).mT


@pytest.mark.ranks(2)
def test_batch_norms_of_microbatches_are_refused_on_every_rank_unless_they_are_frozen():
    model = tiny("llama", layers=2, dtype=torch.float64)
    model.model.layers[1].mlp = Normed(model.model.layers[1].mlp, model.config.hidden_size)
    ids, labels = token_batch(COUNT, 8, vocab_size=60)
    built = build(model.train())
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.norm is a batch norm, which in training normalises over"):
        run(built, ids, labels)
    for part in built[1]:
        part.eval()
    run(built, ids, labels, "eval")
    for part in built[1]:
        part.train()
        for module in part.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
    run(built, ids, labels)


@pytest.mark.ranks(2)
def test_what_goes_over_the_sequences_of_a_batch_is_refused_where_a_microbatch_has_some_of_them():
    model = tiny("llama", layers=2, dtype=torch.float64)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output - output.mean(0))
    ids, labels = token_batch(COUNT, 8, vocab_size=60)
    built = build(model)
    for call in ("step", "eval"):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp computes over the sequences of a batch \(mean\)"):
            run(built, ids, labels, call)
