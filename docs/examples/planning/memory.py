"""The peak of a rank: what lives when, composed of what the ledger weighed and of the sizes of FSDP2's units.

    a layer, pp = 1      forward: gathered, freed        backward: gathered, its gradient reduced, both freed
    in a pipeline        forward: gathered, freed        backward: gathered, stays; gradients whole until the last one
    with cp or ep        gathered from the forward to the backward

Weights, gradients and the optimizer's state are shards in float32; what is gathered is in the dtype to compute in.
"""

from __future__ import annotations

from dataclasses import dataclass

from planning.costs import EXPERTS, REST, Costs, Part
from planning.layouts import Layout

WIDE = 4  # bytes of a number in float32


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak, by kind.

    Attributes:
        weights, gradients, optimizer: shards, and gradients that wait whole for the last microbatch.
        gathered: whole weights of the units that compute, and buffers of their collectives.
        activations: kept for the backward, and temporaries.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


@dataclass(frozen=True)
class Held:
    """What a rank of a pipeline holds.

    Attributes:
        layers: how many of each kind.
        first, last: whether it has the embedding, and the head.
        live: microbatches whose activations it keeps at once, in stages.
        stages: how many it holds.
    """

    layers: tuple[tuple[int, int], ...]
    first: bool
    last: bool
    live: int = 1
    stages: int = 1


def memory_of(costs: Costs, layout: Layout, held: Held, microbatches: int, size: int) -> Memory:
    """The peak of a rank.

    Args:
        costs: of this layout's tensor axis and recomputation.
        microbatches: of a step.
        size: bytes of a number in the dtype to compute in.
    """
    units = [(costs.parts[kind], costs.parts.get(EXPERTS + kind), count) for kind, count in held.layers]
    ends = (costs.before if held.first else 0) + (costs.after if held.last else 0)
    if held.first and held.last:
        ends = costs.parts[REST].parameters
    trained_ends = ends if costs.parts[REST].trained else 0
    share = layout.microbatch / layout.cp  # of a sequence in a microbatch of a rank

    dense, trained = ends, trained_ends
    expert, expert_trained = 0, 0
    for part, experts, count in units:
        dense += count * part.parameters
        trained += count * part.trained
        if experts:
            expert += count * experts.parameters
            expert_trained += count * experts.trained
    stage_ranks = layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp
    copies = stage_ranks // layout.ep if layout.ep > 1 else layout.data
    spread = copies * layout.ep if layout.ep > 1 else layout.data
    shard = dense / layout.data + expert / spread
    trained_shard = trained / layout.data + expert_trained / spread
    weights, optimizer = WIDE * shard, 2 * WIDE * trained_shard

    # Whole weights of layers, and of what is no layer, gathered.
    whole = [
        size * (part.parameters + (experts.parameters / layout.ep if experts else 0)) for part, experts, _ in units
    ]
    largest = max(whole, default=0)
    # Experts that no other rank holds are no unit: their copy in the dtype to compute in is an activation.
    alone = layout.ep > 1 and copies == 1 and bool(layout.recompute)
    stack = sum(size * p.parameters * n if alone else w * n for w, (p, _, n) in zip(whole, units, strict=True))
    number = sum(count for _, _, count in units)
    keeps = layout.stays_gathered
    moving = 2 * largest if number > 1 else largest  # the next one arrives and is copied out

    # Gradients that are not reduced before the last microbatch are whole, in float32.
    local_expert = expert_trained / layout.ep
    unreduced = WIDE * (trained + local_expert) if microbatches > 1 else 0
    reduced = WIDE * trained_shard
    kept = [((part.kept - _elsewhere(experts, layout)) * share, count) for part, experts, count in units]
    stack_kept = sum(k * count for k, count in kept) / held.stages
    rest = costs.parts[REST]
    twin_kept = sum(part.kept for kind, part in costs.parts.items() if 0 <= kind < EXPERTS)
    head_forward = max(rest.forward.transient - twin_kept, rest.kept) * share if held.last else 0
    head_backward = (rest.kept + max(0, rest.backward.transient - size * rest.trained)) * share if held.last else 0
    layer_forward = max((part.forward.transient * share for part, _, _ in units), default=0)
    layer_backward = max(
        (max(0, part.backward.transient - size * _trained(part, experts)) * share for part, experts, _ in units),
        default=0,
    )
    live = held.live * stack_kept
    ends_gathered = size * ends
    local = layout.ep if layout.ep > 1 else 1
    in_backward = (size + WIDE) * max((p.trained + (e.trained / local if e else 0) for p, e, _ in units), default=0)

    moments = [
        # the head, with all activations there
        (unreduced, ends_gathered + (stack if keeps else min(stack, largest)), live + max(head_forward, head_backward)),
        # the first backward of a layer, the gradient of the head on its way
        (
            unreduced,
            ends_gathered + (stack if keeps else min(stack, largest + moving)) + max(in_backward, WIDE * trained_ends),
            live + layer_backward,
        ),
        # the first forward of a layer
        (
            unreduced,
            ends_gathered + (stack if keeps else min(stack, largest + moving)),
            live - max((k for k, _ in kept), default=0) + layer_forward,
        ),
        # the last backward of a layer, with all gradients there
        (
            max(unreduced, reduced),
            (size * costs.before if held.first else 0)
            + (stack if keeps else min(stack, largest + moving))
            + in_backward,
            live - stack_kept + layer_backward,
        ),
    ]
    if layout.pp > 1 and not keeps:  # after a backward all layers of its stage stay gathered until the next forward
        moments.append((unreduced, ends_gathered + stack, max(0, live - stack_kept) + layer_forward))
    gradients, gathered, activations = max(moments, key=sum)
    if layout.pp > 1:  # what every microbatch is received in: hidden states, and their gradients
        activations += microbatches * costs.hidden * share * (2 * held.stages - held.first - held.last)
    return Memory(int(weights), int(gradients), int(optimizer), int(gathered), int(activations))


def _elsewhere(experts: Part | None, layout: Layout) -> float:
    """Of what the experts of a sequence keep: what they do on other tensor ranks, each with its share of the tokens."""
    return experts.kept * (1 - 1 / layout.tp) if experts is not None and layout.ep > 1 else 0.0


def _trained(part: Part, experts: Part | None) -> int:
    return part.trained + (experts.trained if experts else 0)
