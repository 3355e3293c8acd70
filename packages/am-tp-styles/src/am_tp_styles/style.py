"""What a style of ours is: how a rank holds a module's parameters, and what the module does with what it holds."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_styles.axis import Axis, MeshAxis
from am_tp_styles.parameters import distribute


class LocalStyle(ParallelStyle):
    """A style whose module computes on plain local tensors, for `parallelize_module`.

    A subclass says with `layout` which parameters become DTensors, and with `attach` what the module then does. What
    `attach` leaves on the module is plain attributes, exchanged classes and hooks that hold no module, so that a copy
    of the module is a module of its own; and all that the ranks exchange goes through the axis.
    """

    lora_neutral = True

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        """How the module's parameters, by name, lie on an axis of so many ranks; what is not named stays plain."""
        return {}

    def attach(self, module: nn.Module, axis: Axis) -> None:
        """Let the module, which holds this rank's parts already, compute on them."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        source = getattr(self, "src_data_rank", 0)
        distribute(module, self.layout(module, device_mesh.size()), device_mesh, source)
        self.attach(module, MeshAxis(device_mesh))
        return module
