"""What a training step would take on each rank of a mesh, found by running it on nothing.

The model is made of fake tensors, the process group is fake, everything else is real: the layout is made by
`fsdp2_strategy_parallelize`, forward, backward and optimizer step run, and a ledger sees what they would send and hold.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from am_fsdp._torch_compat import init_fake_process_group
from am_fsdp.layout.strategy import fsdp2_strategy_parallelize
from am_fsdp.ledger import Ledger, Traffic


@dataclass(frozen=True)
class StepReport:
    """A training step on one rank. Printing it gives a table.

    Attributes:
        model: its class.
        axes: the mesh.
        tokens: sequences on a data rank, and tokens in each.
        whole: parameters of the model.
        held: parameters on this rank.
        parameters: bytes of this rank's shards.
        gradients: bytes of their gradients.
        optimizer: bytes of the optimizer's state.
        peak: most bytes of live tensors at once, all of the above among them; without what the allocator and the
            communication library keep.
        traffic: the collectives of a step.
    """

    model: str
    axes: dict[str, int]
    tokens: tuple[int, int]
    whole: int
    held: int
    parameters: int
    gradients: int
    optimizer: int
    peak: int
    traffic: tuple[Traffic, ...]

    @property
    def activations(self) -> int:
        """Bytes at the peak that are none of the three before: gathered parameters and temporaries among them."""
        return self.peak - self.parameters - self.gradients - self.optimizer

    def __str__(self) -> str:
        mesh = " x ".join(f"{name} {size}" for name, size in self.axes.items())
        rows = [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("activations and temporaries", self.activations),
            ("peak", self.peak),
        ]
        ranks = math.prod(self.axes.values())
        lines = [
            f"{self.model}, {self.whole:,} parameters, {self.held:,} on each of {ranks:,} ranks",
            f"mesh: {mesh}; {self.tokens[0]} x {self.tokens[1]} tokens on a data rank",
            "",
            f"{'memory of a rank':34}{'':>12}",
            *(f"  {name:32}{_bytes(size):>12}" for name, size in rows),
            "",
            f"{'collectives of a step':34}{'number':>12}{'whole':>12}{'rank sends':>12}",
        ]
        for t in self.traffic:
            sent = _bytes(t.sent)
            lines.append(f"  {t.kind + ' over ' + t.axis:32}{t.number:>12}{_bytes(t.bytes):>12}{sent:>12}")
        if not self.traffic:
            lines.append("  none")
        return "\n".join(lines)


def preflight(
    make_model: Callable[[], nn.Module],
    axes: Mapping[str, int],
    *,
    batch: int = 1,
    seq_len: int = 2048,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **strategy: Any,
) -> StepReport:
    """Run one training step of a model on rank 0 of a mesh of any size, without devices, weights or other ranks.

    Args:
        make_model: builds a model that takes `input_ids` and `labels` and returns a `loss`, as transformers' do; it is
            called where every tensor is fake.
        axes: names and sizes of the mesh, such as `{"data_parallel": 512, "tensor_parallel": 8}`.
        batch: sequences on each data rank.
        seq_len: tokens in a sequence.
        optimizer: made of the parameters.
        strategy: the other arguments of `fsdp2_strategy_parallelize`.

    Returns:
        What the step takes on one rank. Kernels are those for the CPU, whose attention keeps no scores either.

    Raises:
        ValueError: this process is in a process group already, a size is not positive, the layout is refused, or the
            model's forward depends on values, which a fake tensor has none of.
    """
    if dist.is_initialized():
        raise ValueError("a preflight makes a fake process group; run it where no other has been initialised")
    if batch < 1 or seq_len < 1 or not axes or min(axes.values()) < 1:
        raise ValueError(f"batch={batch}, seq_len={seq_len} and the sizes of the axes {dict(axes)} must be positive")
    init_fake_process_group(math.prod(axes.values()))
    try:
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        fake = FakeTensorMode()
        with fake:
            model = make_model()
        whole = sum(p.numel() for p in model.parameters())
        fsdp2_strategy_parallelize(model, mesh, **strategy)
        with fake:
            return _measured(model, mesh, whole, (batch, seq_len), optimizer)
    finally:
        dist.destroy_process_group()


def measure_step(
    model: nn.Module,
    mesh: DeviceMesh,
    batch: dict[str, torch.Tensor],
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> tuple[Ledger, int, int]:
    """Run a training step of a model that is laid out, real or fake, under a ledger.

    Returns:
        The ledger of forward and backward, the bytes of the optimizer's state, and the most bytes alive in the step.
    """
    parameters = list(model.parameters())
    ledger = Ledger(mesh)
    ledger.hold(*map(_local, parameters), *model.buffers(), *batch.values())
    with ledger:
        settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        model(**batch, **settings).loss.backward()
    made = optimizer(parameters)
    update = Ledger(mesh)
    update.hold(*map(_local, parameters), *(_local(p.grad) for p in parameters if p.grad is not None))
    with update:
        made.step()
    states = [_local(v) for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = sum(state.nbytes for state in states)
    return ledger, held, max(ledger.peak + held, update.peak)


def _measured(
    model: nn.Module,
    mesh: DeviceMesh,
    whole: int,
    tokens: tuple[int, int],
    optimizer: Callable[..., torch.optim.Optimizer],
) -> StepReport:
    ids = torch.zeros(tokens, dtype=torch.int64)
    try:
        ledger, state, peak = measure_step(model, mesh, {"input_ids": ids, "labels": ids}, optimizer)
    except RuntimeError as error:
        if type(error).__name__ not in ("DataDependentOutputException", "DynamicOutputShapeException"):
            raise
        raise ValueError(
            f"the forward of {type(model).__name__} depends on values ({error}), which a preflight has none of"
        ) from error
    parameters = [_local(p) for p in model.parameters()]
    return StepReport(
        model=type(model).__name__.removeprefix("FSDP"),
        axes={name: mesh[name].size() for name in mesh.mesh_dim_names or ()},
        tokens=tokens,
        whole=whole,
        held=sum(p.numel() for p in parameters),
        parameters=sum(p.nbytes for p in parameters),
        gradients=sum(_local(p.grad).nbytes for p in model.parameters() if p.grad is not None),
        optimizer=state,
        peak=peak,
        traffic=ledger.traffic,
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"
