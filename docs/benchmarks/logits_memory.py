"""Peak memory of logits and loss at four tensor-parallel ranks: gathered, and sharded over the vocabulary.

    python docs/benchmarks/logits_memory.py

A head of 64 x 32768 over 4096 tokens in float32, forward and backward: whole logits are 512 MiB. Each row is a fresh
group of four processes on gloo; *peak* is the growth of resident memory of rank 0 at its highest.
"""

from __future__ import annotations

import os
import resource
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

from am_tp_plans import vocab_parallel_cross_entropy

RANKS, TOKENS, WIDTH, VOCABULARY = 4, 4096, 64, 32768
KINDS = ("gathered, cross_entropy", "sharded, torch's loss_parallel", "sharded, vocab_parallel_cross_entropy")


def main() -> None:
    print("| logits and loss | peak, MiB | seconds | loss |")
    print("|---|---|---|---|")
    first = None
    for kind in KINDS:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(measure, (kind, store.port, results), nprocs=RANKS)
        peak, seconds, loss = results.get()
        first = first or peak
        print(f"| {kind} | {peak:.0f} ({peak / first:.2f}x) | {seconds:.2f} | {loss:.6f} |")


def measure(rank: int, kind: str, port: int, results) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store)
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    layout = Replicate() if kind.startswith("gathered") else Shard(-1)
    style = ColwiseParallel(output_layouts=layout, use_local_output=kind.startswith("gathered"))
    parallelize_module(head, init_device_mesh("cpu", (RANKS,)), style)
    for tokens in (8, TOKENS):  # a small step first, for what is allocated once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        logits = head(hidden[:tokens])
        if kind.endswith("vocab_parallel_cross_entropy"):
            loss = vocab_parallel_cross_entropy(logits, labels[:tokens])
            loss.backward()
        elif kind.endswith("loss_parallel"):
            with loss_parallel():
                loss = nn.functional.cross_entropy(logits, labels[:tokens])
                loss.backward()
            loss = loss.full_tensor()
        else:
            loss = nn.functional.cross_entropy(logits, labels[:tokens])
            loss.backward()
        del logits
    if rank == 0:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        results.put((peak, time.perf_counter() - start, loss.item()))
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


if __name__ == "__main__":
    main()
