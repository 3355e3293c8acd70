"""A pipeline stage that knows its boundary and its shared parameters, and fails without leaving others waiting."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage

from am_pipeline._torch_compat import is_view
from am_pipeline.cut.boundary import Boundary, Passage
from am_pipeline.cut.messages import Message
from am_pipeline.cut.plan import CutPlan
from am_pipeline.nested import tensors_in
from am_pipeline.step.failure import StepFailure, failed_anywhere
from am_pipeline.step.gathers import GatherRecord


class DecoderStage(PipelineStage):
    """torch's `PipelineStage` over one part of a cut model.

    Attributes:
        plan: the cut that this stage belongs to, the same on every rank.
        boundary: what enters and leaves the part.
        reduces_every_microbatch: whether FSDP2 reduces gradients after every backward instead of once per step: what
            accumulates is then sharded, at the price of a reduce-scatter and an all-gather more per microbatch.
        passages: what the stage does with each microbatch of the running step.
        messages: for each microbatch what it receives and sends; one pair where a schedule of torch's runs the stage.
        receives, sends: meta tensors of what crosses the cut; empty before shapes are known.
        failure: what went wrong in the running step of a schedule of this package; None outside of one.
        has_collectives: whether the part talks to other ranks (data, tensor, expert axes) while it computes. After an
            error in it these are kept company where `gathers` knows how; else it is raised at once.
        gathers: what FSDP2 gathers in the part; None where it has no collectives, or cannot be left in the middle.
        peers: host groups of the ranks that step together with this one, other than those of its pipeline.
    """

    reduces_every_microbatch = False
    passages: tuple[Passage, ...] = ()
    messages: tuple[tuple[Message, Message], ...] = ()
    receives: tuple[torch.Tensor, ...] = ()
    sends: tuple[torch.Tensor, ...] = ()
    failure: StepFailure | None = None
    has_collectives = False
    gathers: GatherRecord | None = None
    peers: tuple[ProcessGroup, ...] = ()

    def __init__(
        self,
        part: nn.Module,
        plan: CutPlan,
        boundary: Boundary,
        stage_index: int,
        device: torch.device,
        group: ProcessGroup,
    ) -> None:
        # What a decoder computes of its own ids, on a stage that receives its encoder's output, does not depend on what
        # arrives. Torch's split of a backward into inputs and weights fails there: such a stage does both at once.
        whole = any(name in plan.stages[stage_index] for name, _ in plan.anatomy.joints)
        builder = (lambda: _nothing_left) if whole else None
        super().__init__(part, stage_index, len(plan.stages), device, group=group, dw_builder=builder)
        self.plan = plan
        self.boundary = boundary
        self._beside: dict[int, tuple[torch.Tensor, ...]] = {}

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self._skips:
            self.boundary.chosen = self.passages[fwd_chunk_id] if self.passages else None
            place = fwd_chunk_id if self.passages else 0  # all are alike where no schedule of this package says more
            self.boundary.receiving, self.boundary.sending = self.messages[place] if self.messages else (None, None)
            try:
                with self._action(f"forward {fwd_chunk_id}"):
                    output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
                if self.is_last:
                    self._keep_output(fwd_chunk_id, output)
                return output
            except Exception as error:
                self._keep_company(f"forward of microbatch {fwd_chunk_id}", error)
            finally:
                self.boundary.chosen = self.boundary.receiving = self.boundary.sending = None
        self._gather_the_rest(f"forward {fwd_chunk_id}")
        outputs = self._zeros(self.sends)
        self.fwd_cache[fwd_chunk_id] = (outputs, [])
        return outputs

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self.has_backward:
            return
        if not self._skips:
            try:
                with self._action(f"backward {bwd_chunk_id}"):
                    super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
                for tensor in self._beside.pop(bwd_chunk_id, ()):
                    if not is_view(tensor):
                        tensor.detach_()
                # A backward in two passes gives inputs gradients of any stride; messages are contiguous.
                gradients = self.bwd_cache[bwd_chunk_id]
                self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in gradients)
                if self.reduces_every_microbatch:
                    self.perform_reduce_grad(1)
                return
            except Exception as error:
                self._keep_company(f"backward of microbatch {bwd_chunk_id}", error)
        self._gather_the_rest(f"backward {bwd_chunk_id}")
        if self.reduces_every_microbatch:
            self.perform_reduce_grad(1)
        self.fwd_cache.pop(bwd_chunk_id, None)
        gradients = zip(self.receives, self._zeros(self.receives), strict=True)
        self.bwd_cache[bwd_chunk_id] = tuple(zeros if like.requires_grad else None for like, zeros in gradients)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self._skips:
            try:
                with self._action(f"weights {bwd_chunk_id}"):
                    super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
                return
            except Exception as error:
                self._keep_company(f"backward of the weights of microbatch {bwd_chunk_id}", error)
        self._gather_the_rest(f"weights {bwd_chunk_id}")

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        # torch calls it in evaluation, too: there is nothing to reduce or to scale.
        if not self.has_backward:
            return
        # Peers reduce together or not at all.
        if self.failure is not None and (failed_anywhere(self.failure, self.peers) if self.peers else self._skips):
            return
        super().perform_reduce_grad(grad_scale_factor)

    # Two stages of one rank hand gradients on without messages; torch does so in evaluation, too, and fails.
    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _keep_output(self, chunk_id: int, output: Any) -> None:
        """torch lets go of the graph behind one tensor; a model may return several, in any structure."""
        tensors = tuple(tensors_in(output))
        self.fwd_cache[chunk_id] = (tensors[:1], self.fwd_cache[chunk_id][1])
        if self.has_backward:
            self._beside[chunk_id] = tensors[1:]

    @property
    def _skips(self) -> bool:
        return self.failure is not None and self.failure.skips

    def _keep_company(self, what: str, error: Exception) -> None:
        """Record an error, to go on with zeros; raise it where that helps nobody."""
        if self.failure is None or (self.has_collectives and not self.can_keep_company):
            raise error
        if self.gathers is not None:
            self.gathers.settle()
        # torch wraps what a module raised.
        self.failure.record(f"stage {self.stage_index}, {what}", _original(error))

    @property
    def can_keep_company(self) -> bool:
        """Whether those who talk to this part are known not to wait for more than what `gathers` knows."""
        return self.gathers is not None and self.gathers.is_known

    def _action(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.gathers is None else self.gathers.action(name)

    def _gather_the_rest(self, action: str) -> None:
        if self.gathers is not None:
            self.gathers.gather_the_rest(action)

    def _zeros(self, like: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(t.shape, dtype=t.dtype, device=self.device) for t in like)


def _nothing_left() -> None:
    """The backward of the weights where that of the inputs has done it."""


def _original(error: Exception) -> Exception:
    cause = error.__cause__
    return _original(cause) if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error
