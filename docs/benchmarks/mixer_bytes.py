"""What a state-space layer sends and runs under context parallelism, with rows that divide over the ranks and without.

    python docs/benchmarks/mixer_bytes.py

One mixer of Bamba (hidden 512), float32, 4096 tokens in all, on four ranks. Bytes are those that a rank hands to
collectives, counted where torch dispatches them; *formula* is computed from the sizes alone. *Tokens run* are those
that a rank's mixer was given in its forward: its share is a quarter of all. *Peak* is the growth of a rank's resident
memory.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts threads, which a fork would lose

import torch
import torch.distributed as dist
from ring_bytes import Bytes
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.bamba.configuration_bamba import BambaConfig
from transformers.models.bamba.modeling_bamba import BambaMixer

from am_moe.context_parallel.mixers import Running, run_on_whole_sequences

RANKS, WIDTH, TOKENS = 4, 512, 4096


def main() -> None:
    print("| rows | forward, MiB | backward, MiB | formula, MiB | tokens run | peak, MiB |")
    print("|---|---|---|---|---|---|")
    for rows in (4, 1):
        context = mp.get_context("fork")
        results = context.SimpleQueue()
        with tempfile.TemporaryDirectory() as folder:
            ranks = [context.Process(target=measure, args=(r, rows, f"{folder}/store", results)) for r in range(RANKS)]
            for process in ranks:
                process.start()
            measured = [results.get() for _ in ranks]
            for process in ranks:
                process.join()
        forward, backward, tokens, peak = (max(column) for column in zip(*measured, strict=True))
        print(
            f"| {rows} | {forward / 2**20:.2f} | {backward / 2**20:.2f} | {formula(rows) / 2**20:.2f} | {tokens} "
            f"| {peak / 1024:.0f} |",
            flush=True,
        )


def measure(rank: int, rows: int, meeting: str, results) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(meeting, RANKS))
    torch.manual_seed(0)
    mixer = BambaMixer(BambaConfig(hidden_size=WIDTH, mamba_n_heads=16, mamba_d_head=64, mamba_d_state=64), 0)
    ran = []
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    mine = TOKENS // rows // RANKS
    run_on_whole_sequences(mixer, "mixer", mesh, lambda: Running(rows, mine, padded=False))
    mixer.in_proj.register_forward_pre_hook(lambda module, args: ran.append(args[0].shape[:2].numel()))
    hidden = torch.randn(rows, mine, WIDTH, requires_grad=True)
    dist.barrier()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Bytes() as forward:
        out = mixer(hidden)
    with Bytes() as backward:
        out.square().mean().backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.put((forward.sent, backward.sent, ran[0], peak))
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


def formula(rows: int) -> float:
    """Forward and backward: two exchanges of a rank's hidden state each, or a gather and a reduce-scatter."""
    state = TOKENS // RANKS * WIDTH * 4
    return 4 * state * (RANKS - 1) / RANKS if rows % RANKS == 0 else 2 * state * (RANKS - 1)


if __name__ == "__main__":
    main()
