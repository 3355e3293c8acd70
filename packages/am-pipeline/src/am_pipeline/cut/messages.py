"""What crosses a cut in a step has one form, whatever each microbatch needs: torch sets its buffers up once.

Microbatches may send other values than each other, or larger ones: the features of their images, of many or of none. A
message has a slot for every value that any of them sends, as large as the largest; who sends fills up with zeros, who
receives takes its part::

    microbatch 0, two images    hidden (2, 8, 64)    features (32, 64)
    microbatch 1, one image     hidden (2, 8, 64)    features (16, 64)
    microbatch 2, text alone    hidden (2, 8, 64)    -
    message                     hidden (2, 8, 64)    features (32, 64)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.nn.functional import pad

from am_pipeline.cut.provenance import Value

Form: TypeAlias = tuple[tuple[int, ...], torch.dtype]  # of a tensor


@dataclass(frozen=True)
class Message:
    """What one microbatch sends over one cut.

    Attributes:
        slots: what is sent, the same for all microbatches of a step.
        own: what this microbatch has to send.
        places: the slot of each.
    """

    slots: tuple[Form, ...]
    own: tuple[Form, ...]
    places: tuple[int, ...]

    def pack(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The slots, filled. Every one is part of the graph, as a backward in two passes asks of all that was sent."""
        mine = dict(zip(self.places, tensors, strict=True))
        return [
            _filled_up(mine[slot], shape) if slot in mine else _nothing(shape, dtype, tensors)
            for slot, (shape, dtype) in enumerate(self.slots)
        ]

    def unpack(self, slots: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What this microbatch was sent. Slots that it does not need get gradients of zero."""
        tensors = [
            slots[slot][tuple(slice(size) for size in shape)] if slots[slot].shape != shape else slots[slot]
            for slot, (shape, _) in zip(self.places, self.own, strict=True)
        ]
        idle = [t for slot, t in enumerate(slots) if slot not in self.places and t.requires_grad]
        if idle and torch.is_grad_enabled():
            place = next((i for i, t in enumerate(tensors) if t.requires_grad), 0)
            tensors[place] = tensors[place] + sum(_zero_of(t).to(tensors[place].dtype) for t in idle)
        return tensors


def messages_of(microbatches: Iterable[Sequence[tuple[Value, Form]]]) -> list[Message]:
    """The messages of all microbatches, each given as the values that it sends, in order."""
    places, slots = [], {}
    for sent in microbatches:
        counts: Counter[tuple] = Counter()
        mine = []
        for value, (shape, dtype) in sent:
            kind = value.unit, value.call, dtype, len(shape)
            key = *kind, counts[kind]  # a unit may return a tensor for each image: which of them it is has no name
            counts[kind] += 1
            slots[key] = tuple(map(max, shape, slots.get(key, shape)))
            mine.append(key)
        places.append((mine, tuple(form for _, form in sent)))
    order = {key: place for place, key in enumerate(slots)}
    forms = tuple((shape, key[2]) for key, shape in slots.items())
    return [Message(forms, own, tuple(order[key] for key in mine)) for mine, own in places]


def _filled_up(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    more = [large - small for small, large in zip(tensor.shape, shape, strict=True)]
    return pad(tensor, [n for size in reversed(more) for n in (0, size)]) if any(more) else tensor


def _nothing(shape: tuple[int, ...], dtype: torch.dtype, beside: Sequence[torch.Tensor]) -> torch.Tensor:
    zeros = torch.zeros(shape, dtype=dtype, device=beside[0].device)
    behind = next((t for t in beside if t.requires_grad), None)
    return zeros if behind is None or not dtype.is_floating_point else zeros + _zero_of(behind).to(dtype)


def _zero_of(tensor: torch.Tensor) -> torch.Tensor:
    """Zero, and a gradient of zeros for the tensor, whatever its numbers are."""
    return tensor.flatten()[:0].sum()
