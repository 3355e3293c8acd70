"""Parameters that live on several stages: their gradients are summed, so that the copies stay one parameter."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from am_pipeline.stage import DecoderStage


def duplicate_parameters(stages: list[PipelineStage]) -> list[nn.Parameter]:
    """This rank's copies of parameters that an earlier stage holds too.

    Whoever sums over the parameters of all ranks, a global gradient norm for instance, leaves these out.
    """
    return [
        stage.submod.get_parameter(name)
        for stage in stages
        if isinstance(stage, DecoderStage)
        for group in stage.plan.shared
        for index, name in group.copies[1:]
        if index == stage.stage_index
    ]


def check_shared_layouts(stages: list[PipelineStage]) -> None:
    """Refuse copies of a shared parameter that are sharded in different ways, on every rank alike.

    Collectives (pipeline axis): one all-gather of an int64 per shared parameter and stage; none without any.

    Raises:
        ValueError: names the copies.
    """
    stage = stages[0]
    if not isinstance(stage, DecoderStage) or not stage.plan.shared:
        return
    local = torch.zeros(sum(len(g.copies) for g in stage.plan.shared), dtype=torch.int64)
    copies = [(group, copy) for group in stage.plan.shared for copy in group.copies]
    for row, (_, copy) in enumerate(copies):
        parameter = _held(stages, copy)
        if parameter is not None:
            local[row] = _fingerprint(parameter)
    local = local.to(stage.device)
    everyone = [torch.empty_like(local) for _ in range(stage.group_size)]
    dist.all_gather(everyone, local, group=stage.group)
    layouts = torch.stack(everyone).amax(0).tolist()
    for group in stage.plan.shared:
        seen = {layouts[row] for row, (g, _) in enumerate(copies) if g is group}
        if len(seen) > 1:
            names = " and ".join(f"{name} (stage {index})" for index, name in group.copies)
            raise ValueError(
                f"{names} are one parameter, but parallelize_fn gave them different shapes, dtypes or placements; "
                "their gradients cannot be summed. Give the embedding and the head the same layout"
            )


def sum_shared_gradients(stages: list[PipelineStage]) -> None:
    """Add up the gradients of all copies of each shared parameter, in stage order, on every rank that has one.

    Collectives (pipeline axis): one batch of point-to-point messages between the ranks that hold copies; what
    travels is each rank's shard of the gradient. The sum runs in the same order everywhere, so that the copies
    get bitwise equal gradients.
    """
    if not stages or not isinstance(stages[0], DecoderStage):
        return
    ops: list[dist.P2POp] = []
    sums: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for group in stages[0].plan.shared:
        mine = {c[0]: _local_gradient(p) for c in group.copies if (p := _held(stages, c)) is not None}
        if not mine or any(g is None for g in mine.values()):
            continue
        terms = []
        for index, _ in group.copies:
            if index in mine:
                terms.append(mine[index])
                continue
            incoming = torch.empty_like(next(iter(mine.values())))
            terms.append(incoming)
            ops.append(_message(dist.irecv, incoming, stages[0], index))
        owners = {stages[0].stage_index_to_group_rank[index] for index, _ in group.copies}
        for gradient in mine.values():
            ops += [
                _message_to(dist.isend, gradient, stages[0], rank) for rank in sorted(owners - {stages[0].group_rank})
            ]
        sums.append((list(mine.values()), terms))
    if ops:
        for work in dist.batch_isend_irecv(ops):
            work.wait()
    for gradients, terms in sums:
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        for gradient in gradients:
            gradient.copy_(total)


def _held(stages: list[PipelineStage], copy: tuple[int, str]) -> nn.Parameter | None:
    for stage in stages:
        if stage.stage_index == copy[0]:
            return stage.submod.get_parameter(copy[1])
    return None


def _local_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """This rank's shard of the gradient; zeros where a trainable parameter got none, None where it is frozen."""
    if not parameter.requires_grad:
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _fingerprint(parameter: nn.Parameter) -> int:
    layout = parameter.placements if isinstance(parameter, DTensor) else ()
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    text = f"{tuple(local.shape)} {parameter.dtype} {layout} {parameter.requires_grad}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) + 1


def _message(op, tensor: torch.Tensor, stage: PipelineStage, peer_stage: int) -> dist.P2POp:
    return _message_to(op, tensor, stage, stage.stage_index_to_group_rank[peer_stage])


def _message_to(op, tensor: torch.Tensor, stage: PipelineStage, group_rank: int) -> dist.P2POp:
    return dist.P2POp(op, tensor, dist.get_global_rank(stage.group, group_rank), group=stage.group)
