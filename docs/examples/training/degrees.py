"""One dataclass owns the degrees of parallelism: checks them, builds the meshes, names the axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

import am_moe


@dataclass(frozen=True)
class Degrees:
    """How many ranks each axis has.

    The world is `pp x dp_replicate x dp_shard x cp x tp`; `ep` of the ranks of a pipeline stage share the experts.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    sequence_parallel: bool = False

    @property
    def dp(self) -> int:
        """How many parts a batch is cut into."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    def check(self, world_size: int, config: Any, batch: int, microbatch: int, seq_len: int) -> None:
        """Refuse degrees that do not fit, before there is a process group.

        Args:
            config: of the model; None for a model without.

        Raises:
            ValueError: names the argument, what it must divide, and what would fit.
        """
        for name, degree in {**self._axes(), "--ep": self.ep}.items():
            if degree < 1:
                raise ValueError(f"{name} must be at least 1, got {degree}")
        if self.world != world_size:
            raise ValueError(
                f"{self._product(self._axes())} is {self.world} ranks, but {world_size} were started; "
                f"start {self.world} or change a degree"
            )
        stage = {name: degree for name, degree in self._axes().items() if name != "--pp"}
        if self.world // self.pp % self.ep:
            raise ValueError(
                f"--ep {self.ep} must divide {self._product(stage)}: experts spread over the ranks of a stage; "
                f"{divisors(self.world // self.pp)}"
            )
        experts = expert_count(config)
        if self.ep > 1 and not experts:
            kind = getattr(config, "model_type", "the model")
            raise ValueError(f"--ep {self.ep}: {kind} has no experts; use --ep 1")
        for axis in ("ep", "tp"):
            degree = getattr(self, axis)
            if experts and experts % degree and (axis == "ep" or self.ep == 1):
                raise ValueError(f"--{axis} {degree} must divide the model's {experts} experts: {divisors(experts)}")
        heads = getattr(config, "num_attention_heads", None) or self.tp
        of_keys = getattr(config, "num_key_value_heads", None) or heads
        fitting = [tp for tp in range(1, heads + 1) if heads % tp == 0 and (of_keys % tp == 0 or tp % of_keys == 0)]
        if self.tp not in fitting:
            known = f"num_attention_heads={heads} and num_key_value_heads={of_keys}"
            raise ValueError(f"--tp {self.tp} does not fit {known}: it can be {', '.join(map(str, fitting))}")
        layers = getattr(config, "num_hidden_layers", self.pp)
        if layers < self.pp:
            raise ValueError(f"--pp {self.pp} is more than the model's {layers} layers")
        if batch % self.dp:
            data = self._product({name: degree for name, degree in stage.items() if name.startswith("--dp")})
            raise ValueError(f"--batch {batch} must be a multiple of {data}: {-(-batch // self.dp) * self.dp}")
        if (batch // self.dp) % microbatch:
            raise ValueError(
                f"--microbatch {microbatch} must divide the {batch // self.dp} sequences of a rank: "
                f"{divisors(batch // self.dp)}"
            )
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("--sequence-parallel needs --tp of at least 2")
        if self.cp > 1 and seq_len % (2 * self.cp):
            fit = -(-seq_len // (2 * self.cp)) * 2 * self.cp
            raise ValueError(f"--seq-len {seq_len} must be a multiple of twice --cp {self.cp}: {fit}")
        if self.sequence_parallel and seq_len // self.cp % self.tp:
            context = f"--cp {self.cp} x " * (self.cp > 1)
            raise ValueError(f"--seq-len {seq_len} must be a multiple of {context}--tp {self.tp} between the layers")

    def meshes(self, device_type: str) -> tuple[DeviceMesh, DeviceMesh]:
        """`(pp, dp_replicate, dp_shard, cp, tp)` for the model and `(pp, ep_shard, ep)` for its experts."""
        return am_moe.build_meshes(
            device_type,
            pp=self.pp,
            dp_replicate=self.dp_replicate,
            dp_shard=self.dp_shard,
            cp=self.cp,
            tp=self.tp,
            ep=self.ep,
        )

    def rows(self, world_mesh: DeviceMesh, batch: int) -> slice:
        """Which sequences of a batch are this rank's."""
        place = world_mesh.get_local_rank("dp_replicate") * self.dp_shard + world_mesh.get_local_rank("dp_shard")
        return slice(place * batch // self.dp, (place + 1) * batch // self.dp)

    def __str__(self) -> str:
        copies = f"dp {self.dp_replicate} copies x {self.dp_shard}" if self.dp_replicate > 1 else f"dp {self.dp_shard}"
        context = f" x cp {self.cp}" if self.cp > 1 else ""
        sequence = " with sequence parallel" if self.sequence_parallel else ""
        return f"pp {self.pp} x {copies}{context} x tp {self.tp}{sequence}, ep {self.ep}"

    def _axes(self) -> dict[str, int]:
        return {
            "--pp": self.pp,
            "--dp-replicate": self.dp_replicate,
            "--dp": self.dp_shard,
            "--cp": self.cp,
            "--tp": self.tp,
        }

    @staticmethod
    def _product(axes: dict[str, int]) -> str:
        """The degrees in the user's words, without those that are 1 unless asked for by default."""
        shown = {n: d for n, d in axes.items() if d > 1 or n not in ("--dp-replicate", "--cp")}
        return " x ".join(f"{name} {degree}" for name, degree in shown.items())


def expert_count(config: Any) -> int:
    """How many experts a layer routes between; 0 for a dense model."""
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return 0


def divisors(number: int) -> str:
    return "it can be " + ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
