"""Cross entropy of logits whose vocabulary is sharded, without ever gathering them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from am_tp_styles.axis import MeshAxis, part_of

_REDUCTIONS = ("mean", "sum", "none")


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`, and a z-loss, of logits that may be sharded over the vocabulary.

    Args:
        logits: `(..., V)`, a DTensor with `Shard(-1)` over one axis (see `keep_logits_sharded`), or a whole one.
            Computed in float32 at least.
        labels: `(...)` of int64, whole on every rank.
        ignore_index: labels that count nothing.
        label_smoothing: share of the target that is spread evenly over the vocabulary, 0 to 1.
        z_loss: factor of the square of the log of the softmax's denominator, added to each token's loss.
        reduction: "mean" over the labels that count, "sum", or "none" for `(...)`.

    Returns:
        A plain tensor, the same on every rank of the axis.

    Collectives (the logits' axis): two all-reduces forward, of one and of three numbers per token; none backward.

    Raises:
        ValueError: shapes that do not fit, another layout, or an option out of range. A label outside the vocabulary
            is an error on the CPU; elsewhere its loss is NaN, because looking would stop the device.
    """
    _check(logits, labels, label_smoothing, z_loss, reduction)
    size = logits.shape[-1]
    axis, start, local = None, 0, logits
    if isinstance(logits, DTensor):
        (placement,) = logits.placements
        local = logits.to_local()
        if isinstance(placement, Shard):
            axis = MeshAxis(logits.device_mesh)
            start, _ = part_of(size, axis)
    counts = labels != ignore_index
    inside = ~counts | ((labels >= 0) & (labels < size))
    if labels.device.type == "cpu" and not bool(inside.all()):
        raise ValueError(f"labels must be in [0, {size}) or {ignore_index}, got {labels[~inside][0].item()}")
    losses = _CrossEntropy.apply(
        local.flatten(0, -2), labels.flatten(), (start, size, axis, label_smoothing, z_loss)
    ).view(labels.shape)
    losses = losses.masked_fill(~counts, 0.0).masked_fill(~inside, float("nan"))
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def keep_logits_sharded(model: nn.Module, plan: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """The plan with the model's logits left as a DTensor sharded over the vocabulary, for a loss that takes them so.

    That is `vocab_parallel_cross_entropy`, or torch's `loss_parallel` around the loss that a model computes itself.

    Raises:
        ValueError: the model names no output embedding, or the plan does not shard it over the vocabulary.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    name = next((name for name, module in model.named_modules() if module is head), None) if head is not None else None
    if name is None:
        raise ValueError(f"{type(model).__name__} names no output embedding whose logits could stay sharded")
    style = plan.get(name)
    if not isinstance(style, ColwiseParallel):
        has = type(style).__name__ if style is not None else "no style"
        raise ValueError(f"the plan has {has} for {name}; only colwise shards its logits")
    sharded = ColwiseParallel(input_layouts=style.input_layouts[0], output_layouts=Shard(-1), use_local_output=False)
    return plan | {name: sharded}


class _CrossEntropy(torch.autograd.Function):
    """Per token: `(1 - smoothing) * (lse - target) + smoothing * (lse - mean of logits) + z * lse ** 2`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, settings: tuple) -> torch.Tensor:
        start, size, axis, smoothing, z_loss = settings
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(-1) if wide.shape[-1] else wide.new_full(wide.shape[:-1], float("-inf"))
        if axis is not None:
            largest = axis.all_reduce(largest, "max")
        here = labels - start
        mine = (here >= 0) & (here < wide.shape[-1])
        column = here.masked_fill(~mine, 0).unsqueeze(-1)
        target = (
            wide.gather(-1, column).squeeze(-1).masked_fill(~mine, 0) if wide.shape[-1] else torch.zeros_like(largest)
        )
        exponentials = (wide - largest.unsqueeze(-1)).exp_()
        sums = torch.stack([exponentials.sum(-1), target, wide.sum(-1)])
        if axis is not None:
            sums = axis.all_reduce(sums)
        denominator, target, total = sums
        lse = denominator.log() + largest
        losses = lse - (1 - smoothing) * target - smoothing * total / size + z_loss * lse.square()
        probabilities = exponentials.div_(denominator.unsqueeze(-1))
        ctx.save_for_backward(probabilities, column, mine, lse)
        ctx.settings = settings
        ctx.dtype = logits.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        if torch.is_grad_enabled():  # what is saved has no graph, so that a part of the second derivative would be lost
            raise RuntimeError(
                "vocab_parallel_cross_entropy has no second derivative (create_graph=True); compute the loss of whole "
                "logits with torch.nn.functional.cross_entropy"
            )
        probabilities, column, mine, lse = ctx.saved_tensors
        _, size, _, smoothing, z_loss = ctx.settings
        gradient = probabilities * (1 + 2 * z_loss * lse).unsqueeze(-1)
        gradient -= smoothing / size
        if gradient.shape[-1]:
            gradient.scatter_add_(-1, column, -((1 - smoothing) * mine.to(gradient.dtype)).unsqueeze(-1))
        return gradient.mul_(gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None


def _check(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, z_loss: float, reduction: str) -> None:
    if logits.shape[:-1] != labels.shape or logits.dim() < 2:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}, which add a dim to them"
        )
    if isinstance(labels, DTensor):
        raise ValueError("labels must be a plain tensor, whole on every rank, not a DTensor")
    if labels.dtype != torch.int64 or not logits.is_floating_point():
        raise ValueError(f"labels must be int64 and logits floating point, got {labels.dtype} and {logits.dtype}")
    if isinstance(logits, DTensor):
        allowed = (Shard(logits.dim() - 1), Shard(-1), Replicate())
        if len(logits.placements) != 1 or logits.placements[0] not in allowed:
            raise ValueError(f"logits must be sharded over the vocabulary of one axis, got {logits.placements}")
    if not 0 <= smoothing <= 1 or z_loss < 0:
        raise ValueError(f"label_smoothing={smoothing} must be in [0, 1] and z_loss={z_loss} not negative")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not one of {', '.join(_REDUCTIONS)}")
