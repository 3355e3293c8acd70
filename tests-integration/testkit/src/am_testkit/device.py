"""Where the ranks of a test compute: a GPU each where there are enough, else one for several, else the CPU.

On GPUs, what a test or transformers makes without naming a device is made there, as if the test had said so. What the
packages make is not: a tensor that they forget to place is on the CPU, as it would be for users, and the test fails.
`AM_DEVICE=cpu` keeps a machine's GPUs out of it.
"""

from __future__ import annotations

import os
import pathlib
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_PACKAGES = f"{os.sep}src{os.sep}am_"
_KIT = str(pathlib.Path(__file__).parent)
_MAKES = {
    *(torch.arange, torch.asarray, torch.empty, torch.empty_permuted, torch.empty_strided, torch.eye, torch.full),
    *(torch.linspace, torch.logspace, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm),
    *(torch.scalar_tensor, torch.tensor, torch.tril_indices, torch.triu_indices, torch.zeros),
}


def device_type() -> str:
    """The device type of the ranks of a test; the CPU outside of them."""
    return "cuda" if dist.is_initialized() and _on_gpus() else "cpu"


def join(store: dist.Store, rank: int, world: int, wait: timedelta) -> None:
    """The default group of a test's ranks, and this rank's device."""
    group: dict[str, Any] = {"store": store, "rank": rank, "world_size": world, "timeout": wait}
    if not _on_gpus():
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **group)
        dist.barrier()  # who leaves at once closes the connections that the others are still making
        return
    alone = torch.cuda.device_count() >= world
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    if alone:
        dist.init_process_group("cpu:gloo,cuda:nccl", **group)
    else:
        import am_testkit.staged

        dist.init_process_group(am_testkit.staged.NAME, **group)
    _OnTheDevice().__enter__()  # until the process ends


class _OnTheDevice(TorchFunctionMode):
    """Factories without a device make their tensor on the GPU, unless one of the packages called them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _MAKES or kwargs.get("device") is not None or _called_by_a_package():
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            return func(*args, **kwargs).to("cuda")
        return func(*args, **kwargs | {"device": "cuda"})


def _called_by_a_package() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if _PACKAGES in name and not name.startswith(_KIT):
            return True
        frame = frame.f_back
    return False


def _on_gpus() -> bool:
    return os.environ.get("AM_DEVICE") != "cpu" and torch.cuda.is_available()
