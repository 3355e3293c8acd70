"""Write down what a piece of a training step communicates and how much memory its tensors take, as it runs.

It sees every operator, real or fake, so the same ledger measures a step on real ranks and one that is only rehearsed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from am_fsdp._torch_compat import group_name_of

# c10d operators and their functional counterparts.
_KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one axis: how many, and the bytes of their whole tensors."""

    axis: str
    ranks: int
    kind: str
    number: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that one rank sends when ranks pass blocks around a ring."""
        share = (self.ranks - 1) / self.ranks
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * share


class Ledger(TorchDispatchMode):
    """A context in which collectives are counted and live tensors weighed.

    Args:
        mesh: names the axes; collectives over other groups are booked under "other".
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        names = mesh.mesh_dim_names or ()
        self._axes = {mesh[name].get_group().group_name: (name, mesh[name].size()) for name in names}
        self._traffic: dict[tuple[str, int, str], list[int]] = {}
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, Any] = {}
        self._resized: set[int] = set()
        self._total = 0
        self.peak = 0

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        return tuple(Traffic(*key, *counted) for key, counted in sorted(self._traffic.items()))

    @property
    def live(self) -> int:
        """Bytes of the tensors seen here that are alive now."""
        self._weigh_again(self._storages)
        return self._total

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._weigh(tensor)
        self.peak = max(self.peak, self._total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to the local tensors comes here again
        output = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if name in _KINDS and namespace in ("c10d", "_c10d_functional"):
            self._book(name, args, output)
        if name == "wait_tensor":
            output = args[0]  # as it is on real ranks; without memory torch makes a new tensor
        outputs = list(_tensors((kwargs or {}).get("out")))  # FSDP2 frees and makes again the storages of these
        for tensor in outputs:
            self._resized.add(id(tensor.untyped_storage()))
        for tensor in (*outputs, *_tensors(output)):
            self._weigh(tensor)
        if self._total > self.peak:
            self._weigh_again(self._resized & self._storages.keys())
            self.peak = max(self.peak, self._total)
        return output

    def _book(self, name: str, args: Any, output: Any) -> None:
        axis, ranks = next((self._axes[g] for g in map(group_name_of, args) if g in self._axes), ("other", 1))
        sizes = [tensor.nbytes for tensor in _tensors((args, output))]
        counted = self._traffic.setdefault((axis, ranks, _KINDS[name]), [0, 0])
        counted[0] += 1
        counted[1] += max(sizes)  # the whole tensor: what is gathered, or what is scattered

    def _weigh(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _ref, key=key: self._forget(key))
        self._weigh_again((key,))

    def _weigh_again(self, keys: Any) -> None:
        for key in list(keys):
            storage = self._storages[key]()
            size = storage.nbytes() if storage is not None else 0
            self._total += size - self._sizes.get(key, 0)
            self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self._total -= self._sizes.pop(key, 0)
        self._storages.pop(key, None)
        self._resized.discard(key)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
