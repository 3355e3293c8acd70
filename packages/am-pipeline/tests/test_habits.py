"""What people write in a decoder's forward is cut and equal to one process, or refused by `plan_cut`: nothing else."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from am_pipeline import build_part, pipeline_model, plan_cut
from am_testkit.device import device_type
from am_testkit.exact import relative_error

from .habits import EITHER, EXACT, HABITS, REFUSED, SIDE_CHANNELS, Decoder, token_rows

TOLERANCE, ROUNDING = 1e-10, 1e-3
# In turn on two and on four stages, and every eighth over ranks under either schedule; with AM_SWEEP all of it.
SWEEP = bool(os.environ.get("AM_SWEEP"))
CUTS = [(name, stages) for place, name in enumerate(HABITS) for stages in ((2, 4) if SWEEP else ((2, 4)[place % 2],))]
OVER_RANKS = {
    schedule: list(HABITS) if SWEEP else list(HABITS)[start::8]
    for start, schedule in enumerate(("1F1B", "Interleaved1F1B"))
}
LENGTHS = (6, 9)  # the second batch is longer: nothing may stay from the first


@pytest.mark.parametrize(("name", "num_stages"), CUTS)
def test_a_habit_is_cut_and_exact_or_refused_by_name(name, num_stages):
    habit = HABITS[name]
    reason = in_a_chain(habit, num_stages)
    if habit.expect == EXACT:
        assert reason is None, f"refused: {reason}"
    if habit.expect == REFUSED:
        assert reason is not None, "cut, though it must be refused"
        assert re.search(habit.words, reason), f"the refusal does not say {habit.words!r}: {reason}"


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B"])
@pytest.mark.ranks(2, timeout=240)
def test_the_habits_that_are_cut_train_over_ranks_as_in_one_process(schedule):
    failures = {}
    for name in OVER_RANKS[schedule]:
        habit = HABITS[name]
        # A group of its own with a short timeout: a habit that hangs or fails on one rank does not take the next along.
        mesh = DeviceMesh.from_group(
            dist.new_group(timeout=timedelta(seconds=5)), device_type(), mesh_dim_names=("pp",)
        )
        try:
            mine = over_ranks(habit, schedule, mesh)
        except Exception as error:
            cause = error.__cause__ or error
            mine = f"{type(cause).__name__}: {cause}"
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if errors := [f"rank {rank}: {each}" for rank, each in enumerate(everyone) if isinstance(each, str)]:
            failures[name] = errors
        elif everyone[0] is not None:
            try:
                compare_with_one_process(habit, everyone)
            except AssertionError as wrong:
                failures[name] = str(wrong).splitlines()[:1]
    table = "\n".join(f"{name}\n  " + "\n  ".join(lines) for name, lines in failures.items())
    assert not failures, f"{len(failures)} of {len(OVER_RANKS[schedule])} habits\n{table}"


def in_a_chain(habit: type[Decoder], num_stages: int) -> str | None:
    """Run the parts one after the other in this process, with what ranks do not share taken away in between.

    Two batches go forward before the first goes backward, as in a schedule.

    Returns:
        Why the model is refused, by `plan_cut` or, where keyword inputs that it was not shown are in the way, by a part
        that names one of them. None if the parts equal the whole.
    """
    model, whole = habit.make(), habit.make()
    before = _state(model)
    try:
        plan = plan_cut(model, num_stages)
    except ValueError as refusal:
        return str(refusal)
    finally:
        assert _state(model) == before, "plan_cut changed the model"
    parts = [build_part(model, plan, stage)[0] for stage in range(num_stages)]
    calls = [habit.inputs(token_rows(4, length, seed=length)) for length in LENGTHS]
    draws = Draws()
    with draws.instead_of_random_numbers():
        try:
            runs = [_forward(model, plan, parts, draws, *call) for call in calls]
        except ValueError as refusal:
            if _names_an_input(refusal, habit):
                return str(refusal)
            raise
        for run in runs:
            _backward(run, draws)
        draws.stage = None
        for call, run in zip(calls, runs, strict=True):
            _empty_side_channels()
            output, expected = run[-1][1], list(_tensors(whole(*call[0], **call[1])))
            # A part that returns one tensor returns the first of the model's, the logits.
            expected = expected[:1] if isinstance(output, torch.Tensor) else expected
            _compare_outputs(output, expected)
            probe(expected).backward()
    _compare_gradients({n: p.grad for n, p in model.named_parameters()}, _gradients(whole))
    return None


@dataclass
class Step:
    """What one rank has after a step: its outputs, if it has the last stage, and the gradients of each of its parts."""

    outputs: list[torch.Tensor]
    is_tensor: bool
    gradients: list[dict[str, torch.Tensor | None]]


def over_ranks(habit: type[Decoder], schedule: str, mesh: DeviceMesh) -> list[Step] | None:
    """Train a step of four microbatches for each length; None where the model or its keyword inputs are refused."""
    model = habit.make()
    try:
        schedule, parts, first, last, _ = pipeline_model(
            model,
            mesh,
            None,
            pp_axis_name="pp",
            dp_axis_names=(),
            layers_per_stage=None,
            pipeline_parallel_schedule_csv=None,
            pipeline_parallel_schedule=schedule,
            microbatch_size=2,
            local_batch_size=8,
            device=torch.device(device_type()),
            loss_fn=lambda output, target: probe(output),
            scale_grads=True,
        )
    except ValueError:
        return None
    steps = []
    with Draws(by_stage=False).instead_of_random_numbers():
        for length in LENGTHS:
            for part in parts:
                part.zero_grad()
            _empty_side_channels()
            ids = token_rows(8, length, seed=length)
            args, kwargs = habit.inputs(ids) if first else ((), {})
            try:
                output = schedule.step(*args, target=ids if last else None, **kwargs)
            except ValueError as refusal:
                if _names_an_input(refusal, habit):
                    return None
                raise
            gradients = [{n: p.grad for n, p in part.named_parameters(remove_duplicate=False)} for part in parts]
            outputs = [tensor.detach() for tensor in _tensors(output)]
            steps.append(Step(outputs, isinstance(output, torch.Tensor), gradients))
    return steps


def compare_with_one_process(habit: type[Decoder], ranks: list[list[Step]]) -> None:
    whole = habit.make()
    with Draws(by_stage=False).instead_of_random_numbers():
        for number, length in enumerate(LENGTHS):
            steps = [rank[number] for rank in ranks]
            outputs, is_tensor = next((step.outputs, step.is_tensor) for step in steps if step.outputs)
            whole.zero_grad()
            _empty_side_channels()
            chunks = []
            for rows in token_rows(8, length, seed=length).chunk(4):
                args, kwargs = habit.inputs(rows)
                result = whole(*args, **kwargs)
                chunks.append(list(_tensors(result))[: 1 if is_tensor else None])
                (probe(chunks[-1]) / 4).backward()
            expected = [torch.cat(each) if each[0].dim() else torch.stack(each) for each in zip(*chunks, strict=True)]
            if is_tensor:
                _compare_outputs(outputs, expected)
            held = [gradients for step in steps for gradients in step.gradients]
            for gradients in held:
                _compare_gradients(gradients, _gradients(whole), complete=False)
            _compare_gradients({n: g for gradients in held for n, g in gradients.items()}, _gradients(whole))


class Draws:
    """Random numbers that one process can repeat, while no two stages draw the same.

    Which numbers are drawn depends on the values of the tensor that they are drawn for and on the stage. A stage that
    draws again what another one has drawn, instead of being sent it, is found out, because one process draws what the
    first of them did.

    Args:
        by_stage: False where stages cannot be told apart.
    """

    def __init__(self, by_stage: bool = True):
        self.stage: int | None = 0 if by_stage else None
        self.first: dict[tuple, int] = {}

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        drawn_for = (*like.shape, round(like.detach().double().sum().item(), 6))
        stage = self.stage
        if stage is None:
            stage = self.first.get(drawn_for, 0)
        else:
            self.first.setdefault(drawn_for, stage)
        generator = torch.Generator().manual_seed(hash((drawn_for, stage)) % 2**31)
        return torch.rand(like.shape, generator=generator, dtype=like.dtype)

    @contextlib.contextmanager
    def instead_of_random_numbers(self) -> Iterator[None]:
        def dropout(x, p=0.5, training=True, inplace=False):
            return x * (self(x) > p) / (1 - p) if training else x

        random.seed(self.stage)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "dropout", dropout)
            patch.setattr(torch, "rand_like", self)
            patch.setattr(torch, "randn_like", self)
            yield


def probe(output: Any) -> torch.Tensor:
    """A loss that weighs every element of every tensor differently and means over the batch."""
    terms = []
    for tensor in _tensors(output):
        wave = torch.arange(tensor[0].numel() if tensor.dim() else 1, dtype=tensor.dtype).cos()
        terms.append((tensor.reshape(-1, wave.numel()) * wave).mean() + 0.1 * tensor.square().mean())
    return torch.stack(terms).sum()


def _forward(model, plan, parts, draws: Draws, args: tuple, kwargs: dict[str, Any]) -> list[tuple[tuple, Any]]:
    """What each part received and returned. Later parts get what a schedule would hand them."""
    shared = kwargs | {next(iter(inspect.signature(model.forward).parameters)): args[0]}
    passed = []
    for stage, part in enumerate(parts):
        _empty_side_channels()
        draws.stage = stage
        received = tuple(_sent_over(t) for t in _as_tuple(passed[-1][1])) if stage else args
        passed.append((received, part(*received, **(shared if stage else kwargs))))
    return passed


def _backward(passed: list[tuple[tuple, Any]], draws: Draws) -> None:
    draws.stage = len(passed) - 1
    probe(passed[-1][1]).backward()
    for stage in reversed(range(len(passed) - 1)):
        draws.stage = stage
        pairs = [
            (tensor, received.grad)
            for tensor, received in zip(_as_tuple(passed[stage][1]), passed[stage + 1][0], strict=True)
            if tensor.requires_grad and received.grad is not None
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


def _names_an_input(refusal: ValueError, habit: type[Decoder]) -> bool:
    return any(name in str(refusal) for name in habit.inputs(token_rows(1, 6, seed=0))[1])


def _sent_over(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_(tensor.is_floating_point())


def _as_tuple(output: Any) -> tuple:
    return output if isinstance(output, tuple) else (output,)


def _empty_side_channels() -> None:
    for channel in SIDE_CHANNELS:
        channel.clear()


def _state(model: Decoder) -> dict[str, Any]:
    """What planning a cut must leave alone: values, gradients, attributes."""
    values = {name: tensor.flatten().tolist() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    gradients = [name for name, p in model.named_parameters() if p.grad is not None]
    return {"values": values, "attributes": attributes, "gradients": gradients, "training": model.training}


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif is_dataclass(output):
        yield from _tensors([getattr(output, field.name) for field in fields(output)])


def _compare_outputs(actual: Any, expected: Any) -> None:
    pairs = list(zip(_tensors(actual), _tensors(expected), strict=True))
    assert pairs, "the last part returns no tensor"
    errors = [relative_error(a, e) for a, e in pairs]
    assert all(error <= TOLERANCE for error in errors), f"silently wrong: outputs off by {errors}"


def _gradients(whole: Decoder) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in whole.named_parameters(remove_duplicate=False)}


def _compare_gradients(actual: dict, expected: dict, complete: bool = True) -> None:
    """A gradient of None counts as one of zeros; with `complete`, no parameter that has one may be missing."""
    wrong = {}
    for name, gradient in actual.items():
        reference = expected[name]
        if gradient is None and reference is None:
            continue
        present = reference if gradient is None else gradient
        zeros = torch.zeros_like(present)
        error = relative_error(
            zeros if gradient is None else gradient, zeros if reference is None else reference, ROUNDING
        )
        if not error <= TOLERANCE:
            wrong[name] = f"{error:.1e}"
    if complete:
        missing = {n for n, g in expected.items() if g is not None and g.any() and n not in actual}
        wrong |= dict.fromkeys(sorted(missing - _names_of_tied(actual, expected)), "held by no stage")
    assert not wrong, f"silently wrong: gradients {wrong}"


def _names_of_tied(actual: dict, expected: dict) -> set[str]:
    """Names of parameters that are there under another name."""
    there = {id(expected[name]) for name in actual}
    return {name for name, gradient in expected.items() if id(gradient) in there}


def test_every_habit_declares_what_it_expects():
    assert len(HABITS) >= 45
    for name, habit in HABITS.items():
        assert habit.expect in (EXACT, REFUSED, EITHER), name
        assert bool(habit.words) == (habit.expect == REFUSED), name
