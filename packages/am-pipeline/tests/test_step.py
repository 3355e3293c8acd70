"""A step adds exactly its own gradients, an evaluation adds none, in every schedule and whatever came before."""

from __future__ import annotations

import contextlib
import traceback

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from am_pipeline import pipeline_model
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss, tiny, token_batch

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
MICROBATCHES = 4
# Batch and length of each training step; None is an evaluation.
CALLS = [(4, 12), None, (4, 12), (4, 7), None, (8, 7), (4, 12)]


def build(model, schedule="1F1B", *, mesh=None, batch=4, **settings):
    mesh = mesh or init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",))
    settings = {"dp_axis_names": (), "loss_fn": next_token_loss, "scale_grads": True} | settings
    return pipeline_model(
        model,
        mesh,
        None,
        pp_axis_name="pp",
        layers_per_stage=None,
        pipeline_parallel_schedule=schedule,
        microbatch_size=batch // MICROBATCHES,
        local_batch_size=batch,
        device=torch.device(device_type()),
        **settings,
    )


def run(built, ids, labels, kind="step", **settings):
    call = getattr(built[0], kind)
    return call(*((ids,) if built[2] else ()), target=labels if built[3] else None, **settings)


def add_gradients(whole, ids, labels, scale):
    """One process on the same microbatches."""
    for i, t in zip(ids.chunk(MICROBATCHES), labels.chunk(MICROBATCHES), strict=True):
        (next_token_loss(whole(i, use_cache=False).logits, t) / (MICROBATCHES if scale else 1)).backward()


def shard_layers(model, world_mesh, moe_mesh, **axes):
    for layer in model.model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(model, mesh=world_mesh["dp"])


@pytest.mark.ranks(2, timeout=90)
def test_steps_before_one_optimizer_step_add_up_in_every_schedule():
    for scale, schedules in ((True, SCHEDULES), (False, ("1F1B", "ZBVZeroBubble"))):
        check_sum_of_steps(scale, schedules)


def check_sum_of_steps(scale, schedules):
    whole = tiny("qwen3", tied=True)
    for number, call in enumerate(CALLS):
        if call is not None:
            add_gradients(whole, *token_batch(*call, seed=number), scale)
    for schedule in schedules:
        built = build(tiny("qwen3", tied=True), schedule, scale_grads=scale)
        first = {}
        for number, call in enumerate(CALLS):
            if call is not None:
                run(built, *token_batch(*call, seed=number))
            else:
                run(built, *token_batch(4, 9), kind="eval")
            held = {name: p.grad for part in built[1] for name, p in part.named_parameters()}
            first = first or held
            assert all(held[name] is first[name] for name in held), "the tensor in .grad stays the same one"
        for part in built[1]:
            assert_same(gradients(part), gradients(whole), 1e-10, f"gradients under {schedule}")


@pytest.mark.ranks(4, timeout=120)
def test_steps_add_up_with_sharded_parts():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    rank = mesh.get_local_rank("dp")
    whole = tiny("qwen3", tied=True)
    calls = [(8, 12), None, (8, 7), (16, 7)]
    for number, call in enumerate(calls):
        if call is not None:
            add_gradients(whole, *token_batch(*call, seed=number), True)
    for schedule in ("GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "DualPipeV"):
        built = build(tiny("qwen3", tied=True), schedule, mesh=mesh, parallelize_fn=shard_layers, dp_axis_names=("dp",))
        with torch.inference_mode():  # before anything else: what FSDP2 and the schedule set up is used in training
            run(built, *token_batch(4, 12), kind="eval")
        for number, call in enumerate(calls):
            ids, labels = token_batch(*(call or (8, 9)), seed=number)
            share = slice(rank * len(ids) // 2, (rank + 1) * len(ids) // 2)
            run(built, ids[share], labels[share], kind="eval" if call is None else "step")
        for part in built[1]:
            assert_same(gradients(part), gradients(whole), 1e-10, f"gradients under {schedule}")


@pytest.mark.ranks(2)
def test_a_schedule_file_evaluates_between_steps_that_add_up(tmp_path):
    path = tmp_path / "order.csv"
    if dist.get_rank() == 0:
        rows = [[f"{rank}{kind}{i}" for kind in "FB" for i in range(MICROBATCHES)] for rank in range(2)]
        path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    dist.barrier()
    whole = tiny("llama", tied=True)
    ids, labels = token_batch(4, 12)
    for _ in range(2):
        add_gradients(whole, ids, labels, True)
    built = build(tiny("llama", tied=True), pipeline_parallel_schedule_csv=str(path))
    for kind in ("eval", "step", "eval", "step"):
        run(built, ids, labels, kind=kind)
    assert_same(gradients(built[1][0]), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(2)
def test_an_evaluation_gives_outputs_and_losses_in_every_schedule_and_mode():
    whole = tiny("qwen3", tied=True)
    ids, labels = token_batch(4, 12)
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
    wanted = [next_token_loss(*pair) for pair in zip(expected.chunk(4), labels.chunk(4), strict=True)]
    for schedule in SCHEDULES:
        built = build(tiny("qwen3", tied=True), schedule)
        for mode in (torch.inference_mode, torch.no_grad, contextlib.nullcontext):
            for target in (None, labels):
                losses: list = []
                with mode():
                    logits = run(built, ids, target, kind="eval", losses=losses)
                if built[3]:
                    assert_same(logits, expected, 1e-12, f"logits under {schedule}")
                    assert not logits.requires_grad
                    assert len(losses) == (0 if target is None else 4)
                    if losses:
                        assert_same(torch.stack(losses), torch.stack(wanted), 1e-12, "losses")
                else:
                    assert logits is None
        assert all(p.grad is None for part in built[1] for p in part.parameters())
        run(built, ids, labels)


@pytest.mark.ranks(2)
def test_a_part_that_ran_forward_alone_before_a_step_is_sharded_again():
    mesh = init_device_mesh(device_type(), (2, 1), mesh_dim_names=("pp", "dp"))
    whole = tiny("llama")
    ids, labels = token_batch(4, 12)
    add_gradients(whole, ids, labels, True)
    built = build(tiny("llama"), mesh=mesh, parallelize_fn=shard_layers)
    parameters = {id(p) for p in built[1][0].parameters()}
    run(built, ids, labels, kind="eval")
    assert {id(p) for p in built[1][0].parameters()} == parameters, "what an optimizer holds"
    run(built, ids, labels)
    assert {id(p) for p in built[1][0].parameters()} == parameters
    assert_same(gradients(built[1][0]), gradients(whole), 1e-10, "gradients")


class HostSyncs(TorchDispatchMode):
    """Counts reads of tensors by the host, for which it would wait for a device, outside of the parts' forwards."""

    def __init__(self, monkeypatch, parts):
        super().__init__()
        self.found = []
        self.within = False  # masks are read in transformers' own forward
        for part in parts:
            part.register_forward_pre_hook(lambda *_: self._enter(True))
            part.register_forward_hook(lambda *_: self._enter(False))
        for name in ("tolist", "cpu", "numpy"):
            self._count_calls(monkeypatch, name)

    def _enter(self, within):
        self.within = within

    def _count_calls(self, monkeypatch, name):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self._add(name)
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self._add(name)
        return function(*args, **(kwargs or {}))

    def _add(self, name):
        if not self.within:
            callers = traceback.extract_stack(limit=8)[:-2]
            if callers[-1].name == "__torch_function__":
                return  # a mode that asks for the same a second time
            self.found.append(f"{name} by {' < '.join(f'{f.name}:{f.lineno}' for f in reversed(callers))}")


@pytest.mark.ranks(2)
def test_a_step_reads_one_tensor_of_the_device_and_one_of_the_hosts(monkeypatch):
    """With tied weights to compare, inputs to share and labels to count, at changing lengths."""
    built = build(tiny("qwen3", tied=True, attention="sdpa"))
    counts = []
    for length in (12, 12, 9):
        ids, labels = token_batch(4, length)
        more = {"position_ids": torch.arange(length).expand(4, -1)} if built[2] else {}
        with HostSyncs(monkeypatch, built[1]) as reads:
            run(built, ids, labels, losses=[], **more)
        counts.append(reads.found)
        monkeypatch.undo()
    # The agreement, and the vote among hosts, which waits for no device.
    assert [len(found) for found in counts[1:]] == [2, 2], "\n".join(counts[1])
