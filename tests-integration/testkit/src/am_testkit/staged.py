"""Several ranks on one GPU: a process group, `"staged"`, whose messages go through the CPU and gloo.

NCCL refuses two ranks on one device. Here each collective copies its tensors to the CPU, lets gloo do it, and copies
the results back before it returns, so that it is slow and in order. All else is what it is on many devices: streams,
FSDP2, flash kernels, autograd's threads, memory. Tensors on the CPU are taken too, so that it is tested anywhere.

    dist.init_process_group("staged", ...)      after `import am_testkit.staged`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # of torch's own tests, too
from torch.distributed.distributed_c10d import ProcessGroupGloo

NAME = "staged"


class Staged(dist.ProcessGroup):
    """The collectives of one group; those of gloo in all but where the tensors are."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = ProcessGroupGloo(store, rank, size, timeout=timeout)

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def pg_name(self) -> str:
        return self.group_name

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return NAME

    @property
    def supports_splitting(self) -> bool:
        return False

    def allreduce(self, tensors, opts=None):
        for tensor in _listed(tensors):
            tensor.detach().copy_(self._reduced(tensor, opts))
        return done(_listed(tensors))

    def allreduce_coalesced(self, tensors, opts=None):
        return self.allreduce(tensors, opts)

    def reduce(self, tensors, opts):
        (tensor,) = _listed(tensors)
        reduced = self._reduced(tensor, opts)
        if self.rank() == opts.rootRank:
            tensor.detach().copy_(reduced)
        return done([tensor])

    def broadcast(self, tensors, opts):
        (tensor,) = _listed(tensors)
        copy = on_cpu(tensor)
        self.gloo.broadcast([copy], opts).wait()
        tensor.detach().copy_(copy)
        return done([tensor])

    def allgather(self, outs, tensors, opts=None):
        for out, tensor in zip(outs, tensors, strict=True):
            copies = [like(each) for each in out]
            self.gloo.allgather([copies], [on_cpu(tensor)]).wait()
            bring_back(copies, out)
        return done(outs)

    def all_gather_single(self, out, tensor, opts=None):
        copy = like(out)
        self.gloo.allgather([list(copy.view(self.size(), *tensor.shape).unbind())], [on_cpu(tensor)]).wait()
        bring_back([copy], [out])
        return done(out)

    def all_gather_single_coalesced(self, outs, tensors, opts=None):
        for out, tensor in zip(outs, tensors, strict=True):
            self.all_gather_single(out, tensor)
        return done(outs)

    def reduce_scatter(self, outs, tensors, opts=None):
        for out, parts in zip(outs, tensors, strict=True):
            out.detach().copy_(self._reduced(torch.stack(tuple(parts)), opts)[self.rank()])
        return done(outs)

    def reduce_scatter_single(self, out, tensor, opts=None):
        reduced = self._reduced(tensor, opts).view(self.size(), -1)
        out.detach().copy_(reduced[self.rank()].view(out.shape))
        return done(out)

    def reduce_scatter_single_coalesced(self, outs, tensors, opts=None):
        for out, tensor in zip(outs, tensors, strict=True):
            self.reduce_scatter_single(out, tensor, opts)
        return done(outs)

    def all_to_all_single(self, out, tensor, received, sent, opts=None):
        copy = like(out)
        self.gloo.alltoall_base(copy, on_cpu(tensor), list(received or []), list(sent or []), _or(opts)).wait()
        bring_back([copy], [out])
        return done(out)

    def alltoall(self, outs, tensors, opts=None):
        flat = torch.cat([on_cpu(each).view(-1) for each in tensors])
        copy = flat.new_empty(sum(out.numel() for out in outs))
        sizes = [out.numel() for out in outs], [each.numel() for each in tensors]
        self.gloo.alltoall_base(copy, flat, *sizes, _or(opts)).wait()
        bring_back([part.view(out.shape) for part, out in zip(copy.split(sizes[0]), outs, strict=True)], outs)
        return done(outs)

    def gather(self, outs, tensors, opts):
        copies = [[like(each) for each in out] for out in outs]
        self.gloo.gather(copies, [on_cpu(each) for each in tensors], opts).wait()
        for copy, out in zip(copies, outs, strict=True):
            bring_back(copy, out)
        return done(outs)

    def scatter(self, outs, tensors, opts):
        copies = [like(each) for each in outs]
        self.gloo.scatter(copies, [[on_cpu(each) for each in parts] for parts in tensors], opts).wait()
        bring_back(copies, outs)
        return done(outs)

    def barrier(self, opts=None):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.gloo.barrier().wait()
        return done([])

    def send(self, tensors, rank, tag=0):
        copies = [on_cpu(each) for each in tensors]
        return Message(self.gloo.send(copies, rank, tag), copies, lambda: None)

    def recv(self, tensors, rank, tag=0):
        copies = [like(each) for each in tensors]
        return Message(self.gloo.recv(copies, rank, tag), copies, lambda: bring_back(copies, tensors))

    # Their names before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _reduced(self, tensor: torch.Tensor, opts) -> torch.Tensor:
        """The sum, mean, scaled sum or other reduction of everyone's tensor, whole, on the CPU."""
        asked = opts.reduceOp if opts is not None else dist.ReduceOp.SUM
        kind, factor = asked.__getstate__() if isinstance(asked, dist.ReduceOp) else (asked, None)
        copy, use = on_cpu(tensor), dist.AllreduceOptions()
        if kind == dist.ReduceOp.PREMUL_SUM:
            copy.mul_(factor)
        averages = kind in (dist.ReduceOp.AVG, dist.ReduceOp.PREMUL_SUM)
        use.reduceOp = dist.ReduceOp.SUM if averages else kind
        self.gloo.allreduce([copy], use).wait()
        return copy.div_(self.size()) if kind == dist.ReduceOp.AVG else copy


class Message(dist.Work):
    """A message under way; what arrived is brought to its device by whoever waits for it."""

    def __init__(self, work: dist.Work, copies: Sequence[torch.Tensor], then: Callable[[], None]) -> None:
        super().__init__()
        self.work, self.copies, self.then, self.over = work, copies, then, False

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self.over:
            self.work.wait(*([timeout] if timeout else []))
            self.then()
            self.over = True
        return True

    def is_completed(self) -> bool:
        return self.over or self.work.is_completed()

    def synchronize(self) -> None:
        self.wait()


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().to("cpu", copy=True)


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def bring_back(copies: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    for copy, tensor in zip(copies, tensors, strict=True):
        tensor.detach().copy_(copy)


def done(result: object) -> dist.Work:
    future = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _listed(tensors):
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def _or(opts):
    return opts if opts is not None else dist.AllToAllOptions()


dist.Backend.register_backend(NAME, Staged, devices=["cpu", "cuda"])
