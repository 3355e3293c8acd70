"""One layer of experts, forward and backward: transformers' grouped kernel, am-moe's dispatchers on one rank with and
without its Triton kernels, and the grouped products alone, timed in turns in one run.

    python docs/benchmarks/expert_layer.py                                    a small shape, for a CPU
    python docs/benchmarks/expert_layer.py --shapes fine mixtral deepseek     three real ones, for a GPU

On a device it computes in bfloat16, on a CPU in float32. Memory is what a turn allocates at most beyond the weights,
their gradients and the inputs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import am_moe
from am_moe.expert_parallel import kernels
from am_moe.expert_parallel.dispatchers.all_to_all import AllToAll


@dataclasses.dataclass(frozen=True)
class Shape:
    tokens: int
    width: int
    inner: int
    experts: int
    choices: int

    @property
    def flops(self) -> int:
        """Of the six grouped products."""
        return 3 * 2 * self.tokens * self.choices * 3 * self.width * self.inner


SHAPES = {
    "small": Shape(2048, 512, 256, 32, 4),
    "fine": Shape(16384, 2048, 768, 128, 8),
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "deepseek": Shape(8192, 7168, 2048, 32, 8),
}
LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    accelerator = torch.accelerator.current_accelerator()
    device = accelerator.type if accelerator is not None else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    name = torch.cuda.get_device_name() if device == "cuda" else device
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    print(f"{name}, torch {torch.__version__}, {dtype}, median of {args.turns} turns of {LAYERS} layers")
    for shape in args.shapes:
        measure(shape, SHAPES[shape], device, args.turns)
    dist.destroy_process_group()


def measure(name: str, shape: Shape, device: str, turns: int) -> None:
    plain, spread, inputs, gradient = build(shape, device)
    ways = {
        "transformers grouped_mm": lambda: plain(*inputs).backward(gradient),
        "am-moe local": lambda: spread["local"](*inputs).backward(gradient),
        "am-moe all_to_all, one rank": lambda: spread["all_to_all"](*inputs).backward(gradient),
        "am-moe local, torch operators": lambda: without_triton(lambda: spread["local"](*inputs).backward(gradient)),
        "the six grouped products alone": products(plain, inputs[1], shape),
    }
    if device == "cpu":
        del ways["am-moe local, torch operators"]  # there are no others
    leaves = [*inputs[::2], *plain.parameters(), *(p for each in spread.values() for p in each.parameters())]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = {}
    for turn in range(turns + 2):
        for way, run in ways.items():
            peak, spent = once(run, leaves, device)
            peaks[way] = peak - sum(p.nbytes for p in plain.parameters()) / 2**20
            if turn >= 2:
                seconds[way].append(spent)
    sizes = ", ".join(f"{field} {value:,}" for field, value in dataclasses.asdict(shape).items())
    print(f"\n{name}: {sizes}\n")
    print("| way | ms | TFLOP/s | of transformers | of the products | MiB |\n|---|---|---|---|---|---|")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    first, last = medians["transformers grouped_mm"], medians["the six grouped products alone"]
    for way, spent in medians.items():
        memory = f"{peaks[way]:,.0f}" if device == "cuda" else ""
        speeds = f"{shape.flops / spent / 1e12:.3g} | {first / spent:.2f} | {last / spent:.2f}"
        print(f"| {way} | {1000 * spent:.2f} | {speeds} | {memory} |", flush=True)


def build(shape: Shape, device: str):
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    torch.manual_seed(0)
    sizes = {"hidden_size": shape.width, "moe_intermediate_size": shape.inner, "num_experts": shape.experts}
    config = Qwen3MoeConfig(**sizes, hidden_act="silu")
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        plain = Qwen3MoeExperts(config).to(dtype)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.02)
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("ep",))
    one = am_moe.apply_ep(nn.ModuleDict({"experts": copy.deepcopy(plain)}), mesh)["experts"]
    two = am_moe.apply_ep(nn.ModuleDict({"experts": copy.deepcopy(plain)}), mesh)["experts"]
    two.spread_experts = dataclasses.replace(two.spread_experts, dispatcher=AllToAll())
    x = torch.randn(shape.tokens, shape.width, device=device, dtype=dtype).requires_grad_()
    weights, ids = torch.rand(shape.tokens, shape.experts, device=device).topk(shape.choices)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    return plain, {"local": one, "all_to_all": two}, (x, ids, weights), torch.randn_like(x)


def once(run: Callable[[], object], leaves: list[torch.Tensor], device: str) -> tuple[float, float]:
    """MiB allocated at most beyond what there was, and seconds of one of LAYERS, which follow each other as in a model:
    the host is ahead of the device where nothing makes it wait."""
    clear(leaves)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(LAYERS):
        clear(leaves)
        run()
    if device != "cpu":
        torch.accelerator.synchronize()
    spent = (time.perf_counter() - start) / LAYERS
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if device == "cuda" else 0.0, spent


def clear(leaves: list[torch.Tensor]) -> None:
    for tensor in leaves:
        tensor.grad = None


def without_triton(run: Callable[[], object]) -> None:
    with mock.patch.object(kernels, "_triton", return_value=None):
        run()


def products(plain: nn.Module, ids: torch.Tensor, shape: Shape) -> Callable[[], None]:
    counts = torch.zeros(shape.experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
    ends = counts.cumsum(0).int()
    up, down = plain.gate_up_proj, plain.down_proj
    rows = torch.randn(ids.numel(), shape.width, device=up.device, dtype=up.dtype).requires_grad_()
    inner = torch.randn(ids.numel(), shape.inner, device=up.device, dtype=up.dtype).requires_grad_()
    dh = torch.randn(ids.numel(), 2 * shape.inner, device=up.device, dtype=up.dtype)
    dy = torch.randn_like(rows)

    def run() -> None:
        h = nn.functional.grouped_mm(rows, up.transpose(1, 2), offs=ends)
        y = nn.functional.grouped_mm(inner, down.transpose(1, 2), offs=ends)
        torch.autograd.backward([h, y], [dh, dy])
        rows.grad = inner.grad = None

    return run


if __name__ == "__main__":
    main()
