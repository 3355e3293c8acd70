"""Bytes that adapters add to tensor-parallel layers: this package's layouts against sharding the LoRA rank.

    torchrun --standalone --nproc-per-node 4 docs/benchmarks/lora_bytes.py

One layer, forward and backward, fp32. *rank-sharded* is the layout of nemo-automodel: `lora_A` of a colwise layer
`Shard(0)`, along the rank, its output gathered; `lora_B` of a rowwise layer `Shard(1)`, along the rank, its input
reduce-scattered. *am-tp-styles* takes the same layer in peft's form and with an adapter of its own. Bytes are what each
rank sends in a ring: 2 (n - 1) / n of the tensor for an all-reduce, (n - 1) / n for the halves of one.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from am_tp_styles import translate_to_lora

TOKENS, RANK = (512, 8192), 16
SIZES = {"colwise": (1024, 4096), "rowwise": (4096, 1024)}


class Bytes(TorchDispatchMode):
    """Collectives of one rank: how many, and the bytes it sends in a ring."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.count, self.sent = ranks, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("_c10d_functional::").rstrip("_")
        if name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single"):
            size = max(args[0].nbytes, out.nbytes)
            self.count += 1
            self.sent += (2 if name == "all_reduce" else 1) * size * (self.ranks - 1) // self.ranks
        return out


class LoraLinear(nn.Linear):
    """A linear with an adapter of its own."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out, bias=False)
        self.lora_A = nn.Linear(features_in, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, features_out, bias=False)

    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x))


class Wrapped(nn.Module):
    """A linear with an adapter in peft's form, without peft."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=False)
        self.base_layer.weight = layer.weight
        self.lora_A = nn.ModuleDict({"default": layer.lora_A})
        self.lora_B = nn.ModuleDict({"default": layer.lora_B})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.lora_magnitude_vector = nn.ModuleDict()

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if dist.get_rank() == 0:
        print("| layer | ranks | tokens | layout | collectives | MiB sent per rank | of them for the adapter |")
        print("|---|---|---|---|---|---|---|")
    for kind in SIZES:
        for tokens in TOKENS:
            report(kind, tokens, mesh)
    dist.barrier()
    os._exit(0)


def report(kind: str, tokens: int, mesh) -> None:
    """Measure every layout, check that their outputs agree, and print a row for each."""
    rows = {}
    for name, make in LAYOUTS.items():
        layer = make(kind, mesh)
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_("lora" in key)
        rows[name] = measure(layer, kind, tokens, mesh)
    *_, expected = rows["rank-sharded"]
    for name, (count, sent, result) in rows.items():
        if name != "no adapter":
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
        mib = [f"{value / 2**20:.2f}" for value in (sent, sent - rows["no adapter"][1])]
        if mesh.get_local_rank() == 0:
            print(f"| {kind} | {mesh.size()} | {tokens} | {name} | {count} | {mib[0]} | {mib[1]} |")


def measure(layer: nn.Module, kind: str, tokens: int, mesh) -> tuple[int, int, torch.Tensor]:
    """Collectives, bytes and output of a forward and backward."""
    torch.manual_seed(1)
    x = torch.randn(1, tokens, SIZES[kind][0])
    if kind == "rowwise":
        x = x.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()].contiguous()
    x.requires_grad_(True)
    with Bytes(mesh.size()) as counted:
        out = layer(x)
        out.square().mean().backward()
    return counted.count, counted.sent, out.detach()


def own(kind: str) -> LoraLinear:
    torch.manual_seed(0)
    return LoraLinear(*SIZES[kind])


def style(kind: str):
    return ColwiseParallel() if kind == "colwise" else RowwiseParallel()


def without_adapter(kind: str, mesh) -> nn.Module:
    torch.manual_seed(0)
    return parallelize_module(nn.Linear(*SIZES[kind], bias=False), mesh, style(kind))


def rank_sharded(kind: str, mesh) -> nn.Module:
    layer = own(kind)
    colwise = kind == "colwise"
    layouts = {"weight": Shard(0 if colwise else 1)}
    layouts |= {"lora_A.weight": Shard(0), "lora_B.weight": Shard(0)} if colwise else {}
    layouts |= {} if colwise else {"lora_A.weight": Shard(1), "lora_B.weight": Shard(1)}
    for name, placement in layouts.items():
        owner, _, leaf = name.rpartition(".")
        tensor = distribute_tensor(layer.get_parameter(name).detach(), mesh, [placement])
        layer.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor))
    layer.lora_A.register_forward_hook(
        lambda _module, _args, out: out.redistribute(placements=[Replicate() if colwise else Shard(-1)])
    )
    entry = Replicate() if colwise else Shard(-1)
    leave = Shard(-1) if colwise else Replicate()
    layer.register_forward_pre_hook(lambda _module, args: DTensor.from_local(args[0], mesh, [entry]))
    layer.register_forward_hook(lambda _module, _args, out: out.redistribute(placements=[leave]).to_local())
    return layer


LAYOUTS = {
    "no adapter": without_adapter,
    "rank-sharded": rank_sharded,
    "am-tp-styles, own": lambda kind, mesh: parallelize_module(own(kind), mesh, translate_to_lora(style(kind))),
    "am-tp-styles, peft": lambda kind, mesh: parallelize_module(
        Wrapped(own(kind)), mesh, translate_to_lora(style(kind))
    ),
}


if __name__ == "__main__":
    main()
