"""Parameters that live on several stages: copies that stay one parameter."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from am_pipeline.cut.plan import SharedParameter
from am_pipeline.step.stage import DecoderStage


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


class SharedCopies:
    """What a rank says of its copies of shared parameters, and whether all copies of each are one parameter.

    In one process they are one tensor, with one value, one `requires_grad` and one place in the optimizer. Over stages
    that is a promise of whoever initialises, freezes and groups parameters, so that it is checked before every step.
    """

    def __init__(self, stages: list[DecoderStage]) -> None:
        self.stages = stages
        self.groups = stages[0].plan.shared
        self.ranks = stages[0].stage_index_to_group_rank
        self.width = 3 * sum(len(group.copies) for group in self.groups)

    def words(self) -> list[int | torch.Tensor]:
        """Three per copy: a hash of its layout, whether it is trained, a sum over its bits; 0 for another rank's.

        Raises:
            AttributeError: a copy is no longer where it was.
        """
        words: list[int | torch.Tensor] = []
        for group in self.groups:
            for copy in group.copies:
                parameter = _held(self.stages, copy)
                words += (0, 0, 0) if parameter is None else _describe(parameter)
        return words

    def check(self, rows: list[list[int]]) -> None:
        """Refuse copies that are not one parameter, on every rank alike.

        Args:
            rows: `words` of all ranks, by group rank.

        Raises:
            ValueError: names the copies, says what differs and how to mend it.
        """
        place = 0
        for group in self.groups:
            seen = []
            for stage, _ in group.copies:
                seen.append(tuple(rows[self.ranks[stage]][place : place + 3]))
                place += 3
            layouts, trained, values = (set(words) for words in zip(*seen, strict=True))
            if len(layouts) > 1:
                raise ValueError(
                    f"{_names(group)} are one parameter, but parallelize_fn gave them different shapes, dtypes or "
                    "placements; their gradients cannot be summed. Give the embedding and the head the same layout"
                )
            if len(trained) > 1:
                yes, no = (_names(group, [words[1] == flag for words in seen]) for flag in (1, 0))
                raise ValueError(
                    f"{_names(group)} are one parameter, but {yes} has requires_grad=True and {no} False; freeze or "
                    "train both: a rule by name finds each copy under its own name"
                )
            if len(values) > 1:
                raise ValueError(
                    f"{_names(group)} are one parameter, but hold different values. If this is the first step, the "
                    "ranks built the model from different seeds: set one seed, or load the same weights on all. If "
                    "not, the copies were updated differently: give both the same optimizer settings (weight decay, "
                    "learning rate; a rule by name finds each copy under its own name)"
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


def _names(group: SharedParameter, chosen: list[bool] | None = None) -> str:
    names = [f"{name} (stage {index})" for index, name in group.copies]
    return " and ".join(name for place, name in enumerate(names) if chosen is None or chosen[place])


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


def _describe(parameter: nn.Parameter) -> tuple[int | torch.Tensor, ...]:
    layout = parameter.placements if isinstance(parameter, DTensor) else ()
    local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
    text = f"{tuple(local.shape)} {parameter.dtype} {layout}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]), int(parameter.requires_grad), _bit_sum(local)


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, read as integers and modulo 2^64: the same in whatever order it is added up.

    It reads the tensor once, on its device. Equal tensors have equal sums; copies that an optimizer moved apart do not.
    """
    flat = tensor.reshape(-1)
    if flat.is_meta:
        return torch.zeros((), dtype=torch.int64)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words start at multiples of their size
    words = torch.uint8 if flat.numel() * flat.element_size() % 8 else torch.int64
    return flat.view(words).sum(dtype=torch.int64)


def _message(op, tensor: torch.Tensor, stage: PipelineStage, peer_stage: int) -> dist.P2POp:
    return _message_to(op, tensor, stage, stage.stage_index_to_group_rank[peer_stage])


def _message_to(op, tensor: torch.Tensor, stage: PipelineStage, group_rank: int) -> dist.P2POp:
    return dist.P2POp(op, tensor, dist.get_global_rank(stage.group, group_rank), group=stage.group)
