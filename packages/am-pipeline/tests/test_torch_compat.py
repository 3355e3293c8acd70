"""The private names of torch that this package touches are still there and still mean the same."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from am_pipeline import _torch_compat as compat
from am_pipeline import _torch_compat_fakes as fakes
from am_testkit.device import device_type


@pytest.mark.ranks(2)
def test_a_schedule_set_up_again_with_new_shapes_runs_on_the_new_ones():
    rank = dist.get_rank()
    stage = PipelineStage(nn.Linear(3, 3), rank, 2, torch.device(device_type()))
    schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
    for width in (4, 6):
        like = torch.empty(1, width, 3, device="meta", requires_grad=True)
        compat.set_shapes(stage, (like,), (like,))
        compat.forget_shapes(schedule)
        batch = torch.ones(2, width, 3)
        out = schedule.step(*((batch,) if rank == 0 else ()), target=batch if rank else None)
        if rank:
            assert out.shape == (2, width, 3)


@pytest.mark.ranks(2)
def test_what_the_last_stage_returns_is_not_compared_with_what_stages_send():
    rank = dist.get_rank()
    stage = PipelineStage(nn.Linear(3, 7 if rank else 3), rank, 2, torch.device(device_type()))
    like = torch.empty(1, 4, 3, device="meta", requires_grad=True)
    compat.set_shapes(stage, (like,), (like,))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: out.sum())
    batch = torch.ones(2, 4, 3)
    out = schedule.step(*((batch,) if rank == 0 else ()), target=batch if rank else None)
    assert out is None or out.shape == (2, 4, 7)


@pytest.mark.ranks(2)
def test_two_stages_of_one_rank_hand_over_without_messages():
    rank = dist.get_rank()
    stages = [PipelineStage(nn.Linear(3, 3), index, 4, torch.device(device_type())) for index in (rank, 3 - rank)]
    like = torch.empty(1, 3, device="meta", requires_grad=True)
    for stage in stages:
        compat.set_shapes(stage, (like,), (like,))
    schedule = ScheduleZBVZeroBubble(stages, 4, loss_fn=nn.functional.mse_loss)
    schedule.step(*((torch.ones(4, 3),) if rank == 0 else ()), target=torch.ones(4, 3) if rank == 0 else None)
    assert all(stage.submod.weight.grad.abs().sum() > 0 for stage in stages)


@pytest.mark.ranks(2)
def test_stages_and_microbatches_of_a_schedule_are_found():
    stages = [PipelineStage(nn.Linear(3, 3), dist.get_rank() + 2 * i, 4, torch.device(device_type())) for i in range(2)]
    schedule = ScheduleInterleaved1F1B(stages, 4)
    assert compat.stages_of(schedule) == stages
    assert compat.n_microbatches(schedule) == 4
    single = PipelineStage(nn.Linear(3, 3), dist.get_rank(), 2, torch.device(device_type()))
    assert compat.stages_of(Schedule1F1B(single, 2)) == [single]


@pytest.mark.ranks(2)
def test_the_compute_dtype_of_a_part_follows_its_mixed_precision_policy():
    mesh = init_device_mesh(device_type(), (2,))
    plain = nn.Linear(4, 4, dtype=torch.float64)
    assert compat.compute_dtype(plain) is torch.float64
    fully_shard(plain, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert compat.compute_dtype(plain) is torch.bfloat16
    other = fully_shard(nn.Linear(4, 4), mesh=mesh)
    assert compat.compute_dtype(other) is torch.float32
    some_in_float32 = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, dtype=torch.bfloat16))
    assert compat.compute_dtype(some_in_float32) is torch.bfloat16
    assert compat.element_size(some_in_float32) == 2


@pytest.mark.ranks(2)
def test_a_schedule_takes_its_inputs_targets_and_losses_from_hooks():
    class Backwards(compat.StepHooks):
        def split_inputs(self, args, kwargs):
            return [tuple(a.chunk(2)[1 - i] for a in args) for i in range(2)], [{}, {}]

        def split_target(self):
            return ["first", "second"]

        def loss_of(self, output, target, **kwargs):
            seen.append(target)
            return output.sum() * kwargs.get("factor", 1)

        def merge_outputs(self, chunks):
            return super().merge_outputs(chunks) + 1

    rank = dist.get_rank()
    for kind in (ScheduleGPipe, ScheduleInterleaved1F1B):
        seen, losses = [], []
        single = kind is ScheduleGPipe
        stages = [
            PipelineStage(nn.Linear(1, 1), rank + 2 * i, 2 if single else 4, torch.device(device_type()))
            for i in range(2 - single)
        ]
        like = torch.empty(1, 1, device="meta", requires_grad=True)
        for stage in stages:
            nn.init.ones_(stage.submod.weight)
            nn.init.zeros_(stage.submod.bias)
            compat.set_shapes(stage, (like,), (like,))
        schedule = type("Mine", (Backwards, kind), {})(stages[0] if single else stages, 2, loss_fn=nn.MSELoss())
        assert compat.has_loss(schedule)
        args = (torch.tensor([[2.0], [3.0]]),) if rank == 0 else ()
        out = schedule.step(*args, losses=losses, loss_kwargs={"factor": 10})
        before = [info.buffer for stage in stages for info in stage.args_recv_info[0]]
        schedule.eval(*args)
        schedule.step(*args)
        after = [info.buffer for stage in stages for info in stage.args_recv_info[0]]
        assert all(a is b for a, b in zip(before, after, strict=True)), "evaluation sets nothing up again"
        if rank:
            assert out.flatten().tolist() == [4, 3]
            assert seen == ["first", "second"] * 3
            assert torch.stack(losses).tolist() == [30, 20]


@pytest.mark.ranks(2)
def test_what_an_interrupted_step_left_is_dropped():
    class Fails(nn.Linear):
        fails = True

        def forward(self, x):
            if self.fails and x.requires_grad:
                raise OSError("no")
            return super().forward(x)

    mesh = init_device_mesh(device_type(), (2, 1), mesh_dim_names=("pp", "dp"))
    rank = dist.get_rank()
    part = fully_shard(nn.Sequential(fully_shard(nn.Linear(1, 1), mesh=mesh["dp"]), Fails(1, 1)), mesh=mesh["dp"])
    stage = PipelineStage(part, rank, 2, torch.device(device_type()), group=mesh.get_group("pp"))
    like = torch.empty(1, 1, device="meta", requires_grad=True)
    compat.set_shapes(stage, (like,), (like,))
    schedule = ScheduleGPipe(stage, 1, loss_fn=nn.MSELoss())
    args, target = ((torch.ones(1, 1),) if rank == 0 else ()), (torch.ones(1, 1) if rank else None)
    parameters = list(part.parameters())
    # Both ranks stop, each in its own place: nobody waits.
    with pytest.raises(OSError, match="no"):
        part(torch.ones(1, 1, requires_grad=True))
    stage.fwd_cache[0] = stage.bwd_cache[0] = "left"
    compat.forget_step(schedule, [stage])
    assert not stage.fwd_cache
    assert not stage.bwd_cache
    assert [id(p) for p in part.parameters()] == [id(p) for p in parameters], "the shards are back"
    part[1].fails = False
    schedule.step(*args, target=target)
    assert all(p.grad is not None for p in parameters)
    part(torch.ones(1, 1))
    compat.settle_fsdp(nn.ModuleList([part]))
    assert [id(p) for p in part.parameters()] == [id(p) for p in parameters]


@pytest.mark.ranks(2)
def test_the_ranks_of_an_fsdp_module_are_counted_and_its_gradients_that_wait_are_dropped():
    module = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh(device_type(), (2,)))
    assert compat.data_ranks(module) == 2
    module.set_requires_gradient_sync(False)
    module(torch.ones(1, 2)).sum().backward()
    compat._drop_unreduced_gradients(module)
    module.set_requires_gradient_sync(True)
    module(torch.ones(1, 2)).sum().backward()
    assert module.weight.grad.full_tensor().flatten().tolist() == [1, 1, 1, 1]


def test_the_order_of_a_schedule_is_known_without_processes():
    rows = compat.order_of("Interleaved1F1B", 2, 2, 2)
    assert [len([cell for cell in row if cell]) for row in rows] == [8, 8]
    assert rows[0][:2] == ["0F0", "0F1"]
    assert rows == compat.order_of("Interleaved1F1B", 2, 2, 2)


def test_views_and_compiled_modules_are_recognised():
    base = torch.zeros(2, 2, requires_grad=True) * 1
    assert compat.is_view(base.view(4))
    assert not compat.is_view(base.clone())
    module = nn.Linear(2, 2)
    assert not compat.is_compiled(module)
    module.compile(backend="eager")
    assert compat.is_compiled(module)
    assert compat.is_compiled(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert compat.element_size(nn.Linear(2, 2, dtype=torch.bfloat16)) == 2


def test_tensors_without_memory_have_shapes_and_share_it_with_their_views():
    fake = fakes.fake_mode()
    with fake:
        weight = nn.Parameter(torch.empty(10**6, 10**6))
        other = torch.empty(3, 10**6)
    product = nn.functional.linear(other, weight)
    assert fakes.is_fake(product)
    assert product.shape == (3, 10**6)
    assert not fakes.is_fake(torch.zeros(1))
    assert fakes.storage_key(weight.view(-1)) == fakes.storage_key(weight.detach())
    assert fakes.storage_key(weight) != fakes.storage_key(product)


aten = torch.ops.aten
OPERATORS = {
    "product": (aten.mm.default, ((4, 6), (6, 5)), ()),
    "in rows": (aten.softmax.int, ((2, 3, 4),), (-1,)),
    "normalised": (aten.native_layer_norm.default, ((2, 6),), ([6], None, None, 1e-5)),
    "in pieces": (aten.split_with_sizes.default, ((5, 2),), ([2, 3],)),
    "turned": (aten.transpose.int, ((2, 3, 4),), (0, 2)),
    "turned and copied": (aten.clone.default, ((2, 3, 4),), ()),
    "flattened": (aten.view.default, ((2, 6),), ([12],)),
    "flattened, unknown to autograd": (aten._unsafe_view.default, ((2, 6),), ([12],)),
    "counted": (aten.argmax.default, ((2, 6),), (1,)),
    "divided": (aten.div.Tensor, ((2, 6),), (2,)),
    "as numbers of another kind": (aten.view.dtype, ((2, 6),), (torch.int32,)),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_an_operator_returns_without_memory_is_what_the_mode_itself_makes(name, turned):
    function, shapes, others = OPERATORS[name]
    fake = fakes.fake_mode()
    with fake:
        given = [torch.empty(shape[::-1]).permute(*range(len(shape))[::-1]) for shape in shapes]
        given = given if turned else [t.contiguous() for t in given]
    if turned and name.startswith("flattened"):
        with pytest.raises(RuntimeError):
            fakes.run_without_memory(fake, function, (*given, *others), {})
        return

    def forms(result):
        tensors = [result] if isinstance(result, torch.Tensor) else list(result)
        memories = [fakes.storage_key(t) for t in tensors]
        shared = [memory == fakes.storage_key(given[0]) for memory in memories]
        assert all(map(fakes.is_fake, tensors))
        assert all(t.device.type == "cpu" for t in tensors)
        return type(result), [(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in tensors], shared

    wanted = forms(function(*given, *others))
    for _ in range(2):  # the second time it is remembered
        assert forms(fakes.run_without_memory(fake, function, (*given, *others), {})) == wanted
    assert forms(function(*given, *others)) == wanted


def test_forms_are_told_apart_by_types_too_and_what_is_written_into_is_the_same_tensor():
    fake = fakes.fake_mode()
    with fake:
        numbers, other = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    add = partial(fakes.run_without_memory, fake, aten.add.Tensor)
    assert [add((numbers, by), {}).dtype for by in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]
    assert fakes.run_without_memory(fake, aten.add_.Tensor, (numbers, other), {}) is numbers
    real = torch.ones(3, dtype=torch.int64)
    assert add((numbers, real), {}).shape == (3,)


def test_what_an_operator_writes_and_draws_is_told_by_its_schema():
    one, two = torch.zeros(2), torch.zeros(2)
    written = compat.written_arguments(aten.add_.Tensor, (one, two), {})
    assert len(written) == 1
    assert written[0] is one
    assert not compat.written_arguments(aten.add.Tensor, (one, two), {})
    written = compat.written_arguments(aten.add.out, (one, two), {"out": two})
    assert len(written) == 1
    assert written[0] is two
    assert compat.is_random(aten.bernoulli_.float)
    assert compat.is_random(aten.rand.default)
    assert not compat.is_random(aten.add.Tensor)
    assert compat.operator_name(aten.index.Tensor) == "aten.index.Tensor"


def test_what_does_not_fit_without_memory_raises_without_a_log(caplog):
    fake = fakes.fake_mode()
    with fake:
        one, two = torch.empty(3, 1), torch.empty(3, 8)
    with fakes.quiet_fakes(), pytest.raises(RuntimeError):
        one.mul_(two)
    assert not caplog.records


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_module_returned_is_seen_after_every_call(compiled):
    module, seen = nn.Linear(2, 2), []
    if compiled:
        module.compile(backend="eager")
    compat.after_each_call(module, seen.append)
    outputs = [module(torch.ones(1, 2)) for _ in range(2)]
    assert all(one is other for one, other in zip(seen, outputs, strict=True))


def test_hooks_of_a_module_and_operators_that_look_at_values_are_known():
    module = nn.Linear(2, 2)
    assert not compat.hooks_of(module)
    assert not compat.backward_hooks_of(module)
    module.register_forward_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    assert compat.hooks_of(module)
    assert compat.backward_hooks_of(module)
    aten = torch.ops.aten
    assert all(map(compat.looks_at_values, (aten.nonzero.default, aten.masked_select.default, aten.index.Tensor)))
    assert not compat.looks_at_values(aten.add.Tensor)


@pytest.mark.ranks(2)
def test_all_gathers_of_units_and_all_other_collectives_are_counted():
    mesh = init_device_mesh(device_type(), (2,))
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in part:
        fully_shard(layer, mesh=mesh)
    seen = []
    units = compat.watch_gathers(fully_shard(part, mesh=mesh), seen.append)
    assert units == [part, *part], "the root first, though it has nothing of its own"
    before = compat.collectives_issued()
    part(torch.ones(1, 2)).sum().backward()
    assert seen == [1, 2, 2, 1]
    assert compat.collectives_issued() == before + 6, "four all-gathers, two reduce-scatters"
    pair = dist.new_group(backend="gloo")
    before = compat.collectives_issued()
    dist.all_reduce(torch.ones(1), group=pair)
    assert compat.collectives_issued() == before + 1
    if compat.can_recover(part):
        for layer in part:
            part(torch.ones(1, 2))  # units are gathered, or wait for a backward
            compat.settle_fsdp(part)
            seen.clear()
            compat.gather_once(layer)
            compat.gather_once(layer)
            assert seen == [units.index(layer)] * 2


def test_flops_of_products_and_attention_are_known_and_hooks_are_listed():
    aten = torch.ops.aten
    one, other = torch.ones(2, 3), torch.ones(3, 4)
    assert compat.flops_of(aten.mm.default, (one, other), {}, one @ other) == 2 * 2 * 3 * 4
    assert compat.flops_of(aten.add.Tensor, (one, one), {}, one) == 0
    query = torch.ones(1, 2, 5, 4)
    attend = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert compat.flops_of(attend, (query, query, query), {}, attend(query, query, query)) == 2 * 2 * 2 * 5 * 5 * 4
    module, hook = nn.Linear(2, 2), print
    module.register_forward_hook(hook)
    assert compat.forward_hooks_of(module) == (hook,)
