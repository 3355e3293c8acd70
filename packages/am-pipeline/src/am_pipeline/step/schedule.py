"""A step of a pipeline schedule that adds exactly its own gradients, and that ends on every rank in the same way."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.nn.modules.batchnorm import _BatchNorm

from am_pipeline._torch_compat import (
    Schedule,
    StepHooks,
    call_loss,
    can_recover,
    forget_step,
    has_loss,
    n_microbatches,
    settle_fsdp,
    stages_of,
)
from am_pipeline.cut.boundary import Passage
from am_pipeline.cut.crossing import IMAGES
from am_pipeline.cut.forms import Piece
from am_pipeline.nested import map_leaves, tensors_in
from am_pipeline.step.agreement import Agreement, Report, exchange_reports, read_reports
from am_pipeline.step.failure import StepFailure, differ, host_group, refuse_together, vote
from am_pipeline.step.gathers import GatherRecord
from am_pipeline.step.gradients import GradientsSetAside
from am_pipeline.step.inputs import (
    ENCODER_INPUTS,
    decoder_length,
    describe_inputs,
    images_length,
    is_per_microbatch,
    receive_inputs,
    split_inputs,
)
from am_pipeline.step.shapes import hidden_dtype, reset_pp_stage_shapes
from am_pipeline.step.shared import SharedCopies, sum_shared_gradients
from am_pipeline.step.stage import DecoderStage
from am_pipeline.step.targets import count_tokens, rows_of, split_target


class PipelineSchedule(StepHooks, Schedule):
    """What `pipeline_model` and `build_pipeline_schedule` return: one of torch's schedule classes and this one.

    A step: the ranks agree on the call (one collective, one host sync), what was in `.grad` is set aside, torch runs
    the microbatches, the ranks vote on how it went (hosts only), copies of shared parameters are summed, and what was
    set aside is added. See `GradientsSetAside` for what that costs in memory.

    Attributes:
        local_batch_size: sequences per step that the schedule was built for.
        ignore_index: labels that do not count as tokens.
        pipeline_tokens: labels of the last step's target on this pipeline that are not `ignore_index`, known on all
            its ranks. A target of several tensors: of its `labels`, else of its first tensor of integers.
        mesh: the mesh given to `pipeline_model`; None otherwise.
        batch_dims: the dim along which a keyword input is split into microbatches, None for whole, where the model's
            own code leaves open which it is.
        averaged_axes: its data and context axes of more than one rank, over which FSDP2 averages gradients.
        peer_axes: all its axes but the pipeline's of more than one rank, along which ranks step together.
    """

    local_batch_size: int = 0
    ignore_index: int = -100
    pipeline_tokens: int = 0
    mesh: DeviceMesh | None = None
    batch_dims: Mapping[str, int | None] = MappingProxyType({})
    averaged_axes: tuple[str, ...] = ()
    peer_axes: tuple[str, ...] = ()
    _running: _Running | None = None
    _shape: tuple[int, tuple, list] | None = None
    _evaluating: bool = False
    _copies: SharedCopies | None = None
    _dtypes: tuple[torch.dtype, ...] = ()
    _host_groups: tuple[dist.ProcessGroup, ...] = ()
    _batch_norms: tuple[tuple[str, nn.Module], ...] | None = None

    @property
    def target_tokens(self) -> int:
        """`pipeline_tokens`, where that is what gradients are divided by.

        Raises:
            ValueError: data or context ranks have other labels, so that it is not.
        """
        if self.averaged_axes:
            raise ValueError(
                f"the mesh has several ranks along {', '.join(self.averaged_axes)}, whose labels count, too: call "
                "scale_grads_by_tokens(schedule), or read schedule.pipeline_tokens for the labels of this pipeline"
            )
        return self.pipeline_tokens

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[torch.Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train on one batch: forwards, backwards, gradients added to `.grad`.

        Args:
            args: the ids `(B, S)` on the first stage's rank; ignored elsewhere. B is `local_batch_size` or another
                multiple of the number of microbatches; both dims may change from step to step.
            target: on the last stage's rank, what `loss_fn` takes: a tensor with B rows, or tuples, lists and dicts of
                them, which reach `loss_fn` in the same structure.
            losses: on the last stage's rank, a list that is filled with one loss per microbatch.
            return_outputs: whether the last stage's rank returns the outputs of the batch.
            loss_kwargs: passed on to `loss_fn`.
            kwargs: inputs of the model, on every rank or on the first stage's alone.

        Raises:
            ValueError, TypeError: a call that cannot run, on every rank of the pipeline, before anything is sent.
            RuntimeError: an exception in a stage or in `loss_fn`, on every rank of the pipeline when the step would
                have ended; `.grad` is as before and the next step can run. So too where FSDP2 shards the parts of a
                schedule with one stage on a rank that reduces gradients once, after a first step that went well
                (`gathers.py`). Where parts communicate in other ways (tensor, context or expert parallelism over
                several ranks), an exception inside a part is raised on its rank at once instead, since the peers of
                those collectives cannot be released: end the process, and torchrun ends the others.
        """
        stages = stages_of(self)
        for stage in stages:
            settle_fsdp(stage.submod)
        before = GradientsSetAside(p for stage in stages for p in stage.submod.parameters())
        more = {"return_outputs": return_outputs} | ({} if loss_kwargs is None else {"loss_kwargs": loss_kwargs})
        try:
            if self.follows_hooks:
                outputs = self._run(stages, _CallOnThisRank(args, kwargs, target, losses), more)
            else:
                outputs = super().step(*args, target=target, losses=losses, **more, **kwargs)
        except BaseException:
            before.restore()
            raise
        if self._evaluating:
            before.restore()
        else:
            before.add()
        return outputs

    def eval(self, *args: Any, target: Any = None, losses: list[torch.Tensor] | None = None, **kwargs: Any) -> Any:
        """The outputs of one batch on the last stage's rank, and its losses if there is a target; without gradients.

        Arguments are those of `step`. `.grad` stays as it is. Nothing is recorded for a backward, whatever grad mode
        the caller is in.
        """
        self._evaluating = True
        try:
            # What FSDP2 gathers and buffers of messages are used by later steps: none may be an inference tensor.
            with torch.inference_mode(False), torch.no_grad():
                return super().eval(*args, target=target, losses=losses, **kwargs)
        finally:
            self._evaluating = False

    def _run(self, stages: list[DecoderStage], call: _CallOnThisRank, more: dict[str, Any]) -> Any:
        if not self._host_groups:
            groups = [stages[0].group]
            if self.mesh is not None and any(stage.has_collectives for stage in stages):
                groups += [self.mesh[axis].get_group() for axis in self.peer_axes]
            self._host_groups = tuple(host_group(group) for group in groups)
            for stage in stages:
                if len(groups) > 1 and stage.has_collectives:
                    stage.peers = self._host_groups[1:]
                    # Where gradients are reduced between microbatches, what a step gathers depends on that.
                    known = not stage.reduces_every_microbatch and can_recover(stage.submod)
                    stage.gathers = GatherRecord(stage.submod) if known else None
        try:
            agreement, offered = self._agree(stages, call)
            shared = self._share(stages, agreement, offered)
            batch_dims = self._follow(stages, agreement, shared)
        except (ValueError, TypeError, RuntimeError) as error:
            refuse_together(error, self._host_groups[1:])
            raise
        refuse_together(None, self._host_groups[1:])
        self._refuse_other_runs(stages)
        failure = StepFailure()
        self._running = _Running(failure)
        for stage in stages:
            stage.failure = failure
            if stage.gathers is not None:
                stage.gathers.begin(training=not self._evaluating)
        try:
            self._prepare(stages, call, shared, agreement.batch, batch_dims)
            outputs = super().step(**more)
            vote(failure, self._host_groups)
            for stage in stages:
                if stage.gathers is not None:
                    stage.gathers.end()
            if not self._evaluating:
                sum_shared_gradients(stages)
            losses = self._running.losses
        except BaseException:
            forget_step(self, stages)
            self._shape = None
            raise
        finally:
            self._running = None
            for stage in stages:
                stage.failure = None
        if self._evaluating:
            for stage in stages:
                settle_fsdp(stage.submod)
        if call.losses is not None and any(stage.is_last for stage in stages):
            call.losses[:] = losses
        return outputs

    def _agree(self, stages: list[DecoderStage], call: _CallOnThisRank) -> tuple[Agreement, list[torch.Tensor]]:
        """What the batch is, or an error that every rank raises; and the tensors that this rank shares."""
        report, text, offered, tokens, words, cause = Report(), "", [], 0, None, None
        if not self._dtypes:
            self._dtypes = tuple(hidden_dtype(stage) for stage in stages)
            self._copies = SharedCopies(stages)
        report.note_dtypes(list(self._dtypes))
        report.mode = 1 + int(self._evaluating) + 2 * int(stages[0].submod.training)
        report.shards = max(getattr(stage.submod, "sequence_shards", 1) for stage in stages)
        try:
            if not self._evaluating and has_loss(self) and not torch.is_grad_enabled():
                raise RuntimeError("step() trains, but gradients are disabled here; call eval() instead")
            words = self._copies.words()
            _refuse_labels(call.kwargs)
            if stages[0].submod.training and n_microbatches(self) > 1:
                self._refuse_batch_norms(stages)
            if any(stage.is_first for stage in stages):
                report.batch, report.seq_len = self._check_ids(call)
                # Every stage runs the code between the units, which may look at the ids.
                given = call.kwargs | {_first_name(stages): call.args[0]}
                text, offered = describe_inputs(given, stages[0].plan.stay)
                report.described = len(text.encode())
            if any(stage.is_last for stage in stages):
                report.rows = self._check_target(call)
                tokens = count_tokens(call.target, self.ignore_index)
        except Exception as error:
            cause, text = error, str(error)
            report.note_error(error)
        first = stages[0].stage_index_to_group_rank[0]
        group, device = stages[0].group, stages[0].device
        words = [0] * self._copies.width if words is None else words
        rows = exchange_reports(report, text, [tokens, *words], group, device)
        agreement = read_reports(rows, self._copies, first, cause)
        if offered:
            agreement.text = text  # whole, where others may have its beginning
        return agreement, offered

    def _refuse_other_runs(self, stages: list[DecoderStage]) -> None:
        """A tower that FSDP2 shards runs on all of its ranks or on none: they wait for each other's weights.

        Parts that see to it say so, see `ParallelizeFnProtocol`.
        """
        peers = self._host_groups[1:]
        if not peers:
            return
        alike = [stage for stage in stages if not getattr(stage.submod, "runs_towers_on_every_rank", False)]
        runs = [[passage.runs for passage in stage.passages] for stage in alike]
        refusal = None
        if differ(zlib.crc32(repr(runs).encode()), peers):
            refusal = ValueError(
                "the data ranks of a stage run different modules in this step, as where one has images and another "
                "none, and would wait for each other's weights: give every rank the same kinds of inputs in the same "
                "microbatches"
            )
        refuse_together(refusal, self._host_groups)

    def _refuse_batch_norms(self, stages: list[DecoderStage]) -> None:
        if self._batch_norms is None:
            parts = [stage.submod for stage in stages]
            found = [(n, m) for part in parts for n, m in part.named_modules() if isinstance(m, _BatchNorm)]
            self._batch_norms = tuple(found)
        name = next((name for name, module in self._batch_norms if module.training), None)
        if name is not None:
            raise RuntimeError(
                f"{name} is a batch norm, which in training normalises over the rows of a microbatch, not of the "
                "batch; freeze its statistics with .eval(), or make the microbatch the batch"
            )

    def _check_ids(self, call: _CallOnThisRank) -> tuple[int, int]:
        if len(call.args) > 1:
            raise ValueError(f"step takes one positional input, got {len(call.args)}; give the others by name")
        needy = [n for n, v in call.kwargs.items() if any(t.requires_grad for t in tensors_in(v))]
        if needy or any(t.requires_grad for t in tensors_in(call.args)):
            raise ValueError(
                f"the input {needy[0] if needy else 'of the first stage'} requires a gradient, which would miss what "
                "later stages add; make it a parameter of the model"
            )
        ids = call.args[0] if call.args else None
        if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
            raise ValueError("the rank of the first stage must call step(ids, ...) with ids of shape (B, S)")
        batch, seq_len = ids.shape[:2]
        count = n_microbatches(self)
        if not batch or batch % count:
            raise ValueError(
                f"the batch has {batch} sequences, but the schedule was built for "
                f"local_batch_size={self.local_batch_size}, or another multiple of its {count} microbatches"
            )
        return batch, seq_len

    def _check_target(self, call: _CallOnThisRank) -> int:
        if call.losses is not None and not isinstance(call.losses, list):
            raise TypeError(f"losses must be a list, got {type(call.losses).__name__}")
        if call.target is None:
            if not self._evaluating and has_loss(self):
                raise ValueError("the rank of the last stage must call step(..., target=labels)")
            return 0
        rows = rows_of(call.target)
        if not rows:
            raise ValueError("the target has no tensor with a row for each sequence")
        return rows

    def _share(self, stages: list[DecoderStage], agreement: Agreement, offered: list[torch.Tensor]) -> dict[str, Any]:
        """The first stage's keyword inputs, on every rank; of those that stay there, the form."""
        if not agreement.described:
            return {}
        first = stages[0].stage_index_to_group_rank[0]
        group, device = stages[0].group, stages[0].device
        stay = stages[0].plan.stay
        return receive_inputs(
            agreement.text, agreement.described, offered, first, group, self._host_groups[0], device, stay
        )

    def _follow(
        self, stages: list[DecoderStage], agreement: Agreement, shared: dict[str, Any]
    ) -> dict[str, int | None]:
        """What stages do with inputs of this form, shapes and buffers for this batch; kept while batches are alike.

        Returns:
            The batch dim of every keyword input that is a tensor.

        Raises:
            ValueError: the model is not cut for such inputs, or they cannot be split; on every rank, as all have the
                same inputs and the same plan.
        """
        if not self._evaluating:
            self.pipeline_tokens = agreement.tokens
        count, plan, name = n_microbatches(self), stages[0].plan, _first_name(stages)
        others = {n: value for n, value in shared.items() if n != name}
        batch_dims: dict[str, int | None] = {name: 0}
        passages = []
        lists = {n for n, value in others.items() if is_per_microbatch(value, count)}
        for microbatch in range(count if lists else 1):
            inputs = {n: _piece(value[microbatch]) if n in lists else value for n, value in others.items()}
            dims, of_stages = plan.reading.passages_for(
                plan.stages,
                shared.get(name),
                inputs,
                agreement.batch,
                agreement.seq_len,
                training=stages[0].submod.training,
                batch_dims=self.batch_dims,
                pieces=count,
                place=microbatch,
            )
            batch_dims |= dims
            passages.append(of_stages)
        passages = passages if lists else passages * count
        mixes = plan.reading.mixes
        if mixes is not None and count > 1:
            raise ValueError(
                f"{mixes.module} computes over the sequences of a batch ({mixes.operator}), and a microbatch has some "
                "of them: make the microbatch the batch, or compute each row by itself"
            )
        later = [passage for of_stages in passages for passage in of_stages[1:]]
        needed = set().union(*(passage.needs - passage.withheld for passage in later))
        if spread := needed & set(shared) & plan.stay:
            raise ValueError(f"later stages depend on {sorted(spread)} themselves, which only the first is given")
        for stage in stages:
            stage.passages = tuple(of_stages[stage.stage_index] for of_stages in passages)
            stage.boundary.passage = stage.passages[0]
        of_decoder = next(iter(decoder_length(others)), None)
        lengths = agreement.seq_len, of_decoder, _images_of_each(others, passages, batch_dims, count)
        shape = (agreement.batch // count, lengths, [[p.sends for p in of_stages] for of_stages in passages])
        if shape != self._shape:
            reset_pp_stage_shapes(self, stages, None, shape[0], *lengths)
            self._shape = shape
        return batch_dims

    def _prepare(
        self,
        stages: list[DecoderStage],
        call: _CallOnThisRank,
        shared: dict[str, Any],
        batch: int,
        batch_dims: dict[str, int | None],
    ) -> None:
        """Inputs and targets of each microbatch. An error is this rank's failure: the others are already under way."""
        count, running = n_microbatches(self), self._running
        holds_first = any(stage.is_first for stage in stages)
        try:
            if unknown := sorted(set(call.kwargs) - set(shared)):
                raise ValueError(f"the rank of the first stage must be given {', '.join(unknown)}, too")
            own = call.args if holds_first else ()
            mine = {name: value for name, value in call.kwargs.items() if value is not None}
            running.inputs = split_inputs(own, shared | mine, count, batch, batch_dims)
            if call.target is not None:
                running.targets = split_target(call.target, count)
        except Exception as error:
            if any(stage.has_collectives and not stage.can_keep_company for stage in stages):
                raise
            running.failure.record("splitting the inputs", error)
        running.inputs = running.inputs or ([()] * count, [{} for _ in range(count)])
        running.targets = running.targets or [None] * count

    def split_inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[tuple], list[dict[str, Any]]]:
        return self._running.inputs

    def split_target(self) -> list[Any]:
        return self._running.targets

    def loss_of(self, output: Any, target: Any, **kwargs: Any) -> torch.Tensor:
        running = self._running
        if target is None or running.failure.skips:
            return _no_loss(output, connected=False)
        if running.failure.error is None:
            try:
                loss = call_loss(self, output, target, **kwargs)
                if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
                    raise TypeError(f"loss_fn must return a scalar tensor, got {what}")
                running.losses.append(loss)
                return loss
            except Exception as error:
                # The backward of nothing, where other ranks take part in the collectives of the part's backward.
                goes_on = any(stage.has_collectives for stage in stages_of(self))
                place = f"stage {stages_of(self)[0].num_stages - 1}, loss of microbatch {len(running.losses)}"
                running.failure.record(place, error, skips=not goes_on)
        return _no_loss(output, connected=not running.failure.skips)

    def merge_outputs(self, chunks: list[Any]) -> Any:
        failed = self._running is not None and self._running.failure.error is not None
        return None if failed or not chunks else _merged(chunks)


def _first_name(stages: list[DecoderStage]) -> str:
    return stages[0].plan.reading.form.first.name


def _images_of_each(
    inputs: dict[str, Any], passages: list[tuple[Passage, ...]], batch_dims: dict[str, int | None], count: int
) -> list[int]:
    """The images, or patches, that a tower takes of every microbatch; 0 where no size of a message depends on them."""
    sent = [[crossed.shape for passage in of_stages for crossed in passage.sends] for of_stages in passages]
    matter = [any(IMAGES.of[0] in shape.sizes for shape in shapes) for shapes in sent]
    if not any(matter):
        return [0] * count
    _, pieces = split_inputs((), {n: v for n, v in inputs.items() if n in ENCODER_INPUTS}, count, 0, batch_dims)
    return [images_length(piece) or 0 if matters else 0 for piece, matters in zip(pieces, matter, strict=True)]


def _piece(value: torch.Tensor | None) -> Piece | None:
    return None if value is None else Piece(value)


def _merged(chunks: list[Any]) -> Any:
    """The outputs of a batch from those of its microbatches: tensors along dim 0, numbers one after the other."""
    rows = zip(*(list(tensors_in(chunk)) for chunk in chunks), strict=True)
    whole = iter([torch.cat(row) if row[0].dim() else torch.stack(row) for row in rows])
    return map_leaves(chunks[0], lambda leaf: next(whole) if isinstance(leaf, torch.Tensor) else leaf)


@dataclass
class _CallOnThisRank:
    """The arguments of a step as this rank gave them."""

    args: tuple
    kwargs: dict[str, Any]
    target: Any
    losses: list[torch.Tensor] | None


@dataclass
class _Running:
    """What a step in progress works with."""

    failure: StepFailure
    inputs: tuple[list[tuple], list[dict[str, Any]]] | None = None
    targets: list[Any] | None = None
    losses: list[torch.Tensor] = field(default_factory=list)


def _refuse_labels(kwargs: dict[str, Any]) -> None:
    for name in ("labels", "return_loss"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f"{name}= makes the model compute a loss of its own, which a pipeline stage cannot; give the labels as "
                "target= on the last stage's rank, and loss_fn when the schedule is built"
            )


def _no_loss(output: Any, connected: bool) -> torch.Tensor:
    """A loss of zero: connected to the output, so that its backward runs and gives zeros, or to nothing."""
    tensor = next(tensors_in(output))
    return (tensor * 0).sum() if connected else torch.zeros((), device=tensor.device)


@cache
def exact(kind: type[Schedule]) -> type[PipelineSchedule]:
    """One of torch's schedule classes, with the step of this package."""
    return type(kind.__name__, (PipelineSchedule, kind), {"__module__": __name__})


def cut_here(stages: list[PipelineStage]) -> bool:
    """Whether the stages come from `split_model_into_stages`: what crosses their boundaries is then known."""
    return all(isinstance(stage, DecoderStage) for stage in stages)
