"""One dataclass owns the degrees of parallelism: checks them, builds the meshes, names the axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Degrees:
    """How many ranks each axis has. The world is `pp x dp x cp x tp`; `ep` of the `dp x cp` ranks share the experts."""

    pp: int
    dp: int
    tp: int
    ep: int
    sequence_parallel: bool
    cp: int = 1

    def check(self, world_size: int, config: Any, batch: int, microbatch: int, seq_len: int) -> None:
        """Refuse degrees that do not fit, before there is a process group.

        Raises:
            ValueError: names the argument, what it must divide, and what would fit.
        """
        for name in ("pp", "dp", "cp", "tp", "ep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        product = self.pp * self.dp * self.cp * self.tp
        context = f" x --cp {self.cp}" if self.cp > 1 else ""
        if product != world_size:
            raise ValueError(
                f"--pp {self.pp} x --dp {self.dp}{context} x --tp {self.tp} is {product} ranks, but {world_size} were "
                f"started; start {product} or change a degree"
            )
        if self.dp * self.cp % self.ep:
            raise ValueError(
                f"--ep {self.ep} must divide --dp {self.dp}{context}: experts spread over the data-parallel ranks"
            )
        experts = expert_count(config)
        if self.ep > 1 and not experts:
            raise ValueError(f"--ep {self.ep}: {config.model_type} has no experts; use --ep 1")
        for axis in ("ep", "tp"):
            degree = getattr(self, axis)
            if experts and experts % degree and (axis == "ep" or self.ep == 1):
                raise ValueError(f"--{axis} {degree} must divide the model's {experts} experts: {divisors(experts)}")
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None) or config.num_attention_heads
            if heads % self.tp:
                raise ValueError(f"--tp {self.tp} must divide {name}={heads}: {divisors(heads)}")
        if config.num_hidden_layers < self.pp:
            raise ValueError(f"--pp {self.pp} is more than the model's {config.num_hidden_layers} layers")
        if batch % self.dp:
            raise ValueError(f"--batch {batch} must be a multiple of --dp {self.dp}: {-(-batch // self.dp) * self.dp}")
        if (batch // self.dp) % microbatch:
            raise ValueError(
                f"--microbatch {microbatch} must divide the {batch // self.dp} sequences of a rank: "
                f"{divisors(batch // self.dp)}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("--sequence-parallel needs --tp of at least 2")
        if self.sequence_parallel and self.cp > 1:
            raise ValueError("--sequence-parallel and --cp both shard the sequence; use one of them")
        if self.cp > 1 and seq_len % (2 * self.cp):
            fit = -(-seq_len // (2 * self.cp)) * 2 * self.cp
            raise ValueError(f"--seq-len {seq_len} must be a multiple of twice --cp {self.cp}: {fit}")
        if self.sequence_parallel and seq_len % self.tp:
            raise ValueError(f"--seq-len {seq_len} must be a multiple of --tp {self.tp} with --sequence-parallel")

    def world_mesh(self, device_type: str) -> DeviceMesh:
        """`(pp, dp, tp)`, or `(pp, dp, cp, tp)`; tensor-parallel ranks next to each other."""
        axes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}
        if self.cp == 1:
            del axes["cp"]
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def expert_mesh(self, device_type: str) -> DeviceMesh | None:
        """The same ranks as `(pp, ep_shard, ep, tp)`, data rank `d` being `(d // ep, d % ep)`; None without experts."""
        if self.ep == 1:
            return None
        sizes = (self.pp, self.dp * self.cp // self.ep, self.ep, self.tp)
        return init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "ep_shard", "ep", "tp"))

    def __str__(self) -> str:
        sequence = " with sequence parallel" if self.sequence_parallel else ""
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        return f"pp {self.pp} x dp {self.dp}{context} x tp {self.tp}{sequence}, ep {self.ep}"


def expert_count(config: Any) -> int:
    """How many experts a layer routes between; 0 for a dense model."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 0


def divisors(number: int) -> str:
    return "it can be " + ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
