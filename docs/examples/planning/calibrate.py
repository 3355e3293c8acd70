"""Measure what this machine can do, in under a minute; on a GPU if there is one, else on a CPU core.

products     squares of rising size                    attention    causal, as transformers calls it
grouped      eight experts of a product each           element-wise a * b + c on a large tensor
host         small operators, forward and backward     a unit       a small layer with FSDP2 around it and without
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from planning.costs import REST, count_costs
from planning.machine import Link, Machine
from planning.model import of_model


def calibrate(dtype: torch.dtype, base: Machine | None = None) -> Machine:
    """Measure on one device.

    Args:
        dtype: to compute in.
        base: whose links, peak and memory are kept; those of a CPU, whose ranks share cores, if None.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    products = tuple(
        (math.log10(2.0 * n**3), _product(n, dtype, device))
        for n in ((256, 512, 1024, 2048, 4096, 8192) if gpu else (64, 128, 256, 512, 1024))
    )

    def like(flops: float) -> float:
        right = next((i for i, (size, _) in enumerate(products) if size >= math.log10(flops)), len(products) - 1)
        return products[right][1]

    heads, length, width = (16, 4096, 128) if gpu else (4, 512, 64)
    q = torch.randn(1, heads, length, width, dtype=dtype, device=device, requires_grad=True)
    attend = nn.functional.scaled_dot_product_attention
    pairs = heads * length * length / 2
    with torch.no_grad():
        forward = _seconds(lambda: attend(q, q, q, is_causal=True), device)
    both = _seconds(lambda: attend(q, q, q, is_causal=True).sum().backward(), device)
    flops = 4.0 * pairs * width
    moving = tuple(_moved(2**power, dtype, device) for power in ((16, 20, 23, 26) if gpu else (10, 15, 19, 22, 25)))
    small = torch.ones(4, device=device)
    kernel = (
        _seconds(lambda: small.add_(1.0), device, repeats=200) if not gpu else _queued(lambda: small.add_(1.0), device)
    )
    operators = _operators(device)
    name = torch.cuda.get_device_name() if gpu else "cpu"
    return Machine(
        name=name,
        source=f"measured, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}",
        memory=torch.cuda.get_device_properties(0).total_memory if gpu else base.memory if base else 8 * 2**30,
        peak=base.peak if base else products[-1][1],
        products=products,
        grouped=_grouped(dtype, device) / like(2.0 * 256 * 1024 * 1024 if gpu else 2.0 * 64 * 256 * 256),
        attention=flops / forward / like(flops),
        attention_backward=2.5 * flops / max(both - forward, 1e-9) / like(2.5 * flops),
        moving=moving,
        kernel=kernel,
        forward_operator=operators[0],
        backward_operator=operators[1],
        unit=_unit(device, dtype),
        inside=base.inside if base else Link(_copied() / 4, 2e-4),
        across=base.across if base else Link(_copied() / 4, 2e-4),
        overlap=1.0 if gpu else 0.0,
        at_once=0 if gpu else os.cpu_count() or 1,
        per_node=base.per_node if base else 8,
    )


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The least of some rounds, each of a few calls; on a CPU its own time, which others do not change."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best = math.inf
    for _ in range(4):
        _wait(device)
        begun = clock()
        for _ in range(repeats):
            call()
        _wait(device)
        best = min(best, (clock() - begun) / repeats)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _product(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    if device.type == "cuda" and size < 2048:  # the host would take longer
        return 2.0 * size**3 / _queued(lambda: a @ b, device)
    return 2.0 * size**3 / _seconds(lambda: a @ b, device, 20 if size <= 1024 else 5)


def _moved(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The logarithm of the bytes of an addition of this size, and bytes per second."""
    x, y = (torch.ones(elements, dtype=dtype, device=device) for _ in range(2))
    return math.log10(3 * x.nbytes), 3 * x.nbytes / _seconds(lambda: torch.add(x, y, alpha=2.0), device, 20)


def _grouped(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of eight products of one call; on a CPU torch computes one after the other."""
    rows, width = (256, 1024) if device.type == "cuda" else (64, 256)
    x = torch.randn(8 * rows, width, dtype=dtype, device=device)
    w = torch.randn(8, width, width, dtype=dtype, device=device)
    if not hasattr(nn.functional, "grouped_mm") or (device.type == "cuda" and dtype != torch.bfloat16):
        call = lambda: torch.bmm(x.view(8, rows, width), w)  # noqa: E731
    else:
        ends = torch.arange(1, 9, dtype=torch.int32, device=device) * rows
        call = lambda: nn.functional.grouped_mm(x, w, offs=ends)  # noqa: E731
    return 8 * 2.0 * rows * width * width / _seconds(call, device)


def _queued(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a short kernel on a device that has enough to do: those of a graph of them."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            call()
    return _seconds(graph.replay, device) / 100


def _operators(device: torch.device) -> tuple[float, float]:
    """Seconds of the host for an operator of a forward and of a backward: a small Llama's, counted by a trace."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", num_hidden_layers=4, vocab_size=64, use_cache=False, **sizes)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    costs = count_costs(of_model(twin, "llama"), seq_len=8, dtype=torch.float32)
    counted = [
        4 * share[0].operators + share[1].operators
        for share in zip(*((part.forward, part.backward) for part in (costs.parts[0], costs.parts[REST])), strict=True)
    ]
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    forward = _seconds(lambda: model(ids, labels=ids), device)
    both = _seconds(lambda: model(ids, labels=ids).loss.backward(), device)
    return forward / counted[0], (both - forward) / counted[1]


def _unit(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of the host for a unit of FSDP2, gathered and reduced, forward and backward, in one rank."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore()
        )
    try:
        plain = nn.Sequential(*(nn.Linear(8, 8, device=device) for _ in range(12)))
        sharded = nn.Sequential(*(nn.Linear(8, 8, device=device) for _ in range(12)))
        mesh = init_device_mesh(device.type, (1,))
        for layer in sharded:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        x = torch.ones(2, 8, device=device)
        spans = [_seconds(lambda model=model: model(x).sum().backward(), device, 4) for model in (plain, sharded)]
        return max(0.0, spans[1] - spans[0]) / (12 * 3)  # gathered twice, reduced once
    finally:
        if made:
            dist.destroy_process_group()


def _copied() -> float:
    """Bytes per second of a copy in memory, which messages between ranks of a CPU are made of."""
    source = torch.ones(2**23)
    target = torch.empty_like(source)
    return source.nbytes / _seconds(lambda: target.copy_(source), torch.device("cpu"))
