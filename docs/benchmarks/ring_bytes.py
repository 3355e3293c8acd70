"""What one attention layer sends under context parallelism, and what a step over 8192 tokens holds.

    python docs/benchmarks/ring_bytes.py

Bytes are those that a rank hands to collectives and messages, counted where torch dispatches them (a gather or a
reduce-scatter as in a ring), as the mean over four ranks; *formula* is computed from the sizes alone. *ring* is the
textbook ring, in which each rank hands all keys and values on to its neighbour, and in the backward their gradients
with them. Memory is the largest growth of a rank's resident memory in a forward and backward of a one-layer Llama.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import resource
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts threads, which a fork would lose

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from am_moe.context_parallel import COMM_TYPES, apply_cp, shard_batch, shard_loss

RANKS, HEADS, KEY_HEADS, WIDTH = 4, 8, 2, 64
TOKENS, MANY = 2048, 8192  # bytes are in proportion to them, memory has to be seen
# A window of a sixteenth of the tokens; packed documents of three sixteenths.
MASKS = ("causal", "full", "window", "documents")


class Bytes(TorchDispatchMode):
    """What a rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name == "c10d::send":
            self.sent += sum(tensor.nbytes for tensor in args[0])
        elif name == "c10d::_allgather_base_":
            self.sent += args[0].nbytes - args[1].nbytes
        elif name == "c10d::_reduce_scatter_base_":
            self.sent += args[1].nbytes - args[0].nbytes
        elif name == "c10d::alltoall_base_":
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            self.sent += args[1].nbytes * (ranks - 1) // ranks
        return function(*args, **(kwargs or {}))


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.AutoModelForCausalLM  # noqa: B018  (imported before the forks)
    torch_itself()
    print(f"\n| mask | type | forward, MiB | backward, MiB | formula, MiB | of a ring's {ring() * 3 / 2**20:.1f} |")
    print("|---|---|---|---|---|---|")
    for mask in MASKS:
        for kind in COMM_TYPES:
            results = launch(RANKS, kind, mask, "sdpa", TOKENS)
            forward, backward = (sum(r[i] for r in results) / RANKS / 2**20 for i in (0, 1))
            expected = formula(kind, mask) / 2**20
            share = (forward + backward) / (ring() * 3 / 2**20)
            print(f"| {mask} | {kind} | {forward:.2f} | {backward:.2f} | {expected:.2f} | {share:.2f}x |")
    print("\n| mask | ranks | type | peak, MiB | seconds |")
    print("|---|---|---|---|---|")
    rows = [("causal", 1, "transformers, eager"), ("causal", 1, "transformers, sdpa")]
    rows += [("causal", ranks, kind) for ranks in (1, 2, 4) for kind in COMM_TYPES[: 1 if ranks == 1 else 3]]
    rows += [("window", ranks, "p2p") for ranks in (1, 2, 4)]
    for mask, ranks, kind in rows:
        results = launch(ranks, kind, mask, kind.partition(", ")[2] or "sdpa", MANY)
        peak, seconds = max(r[2] for r in results), max(r[3] for r in results)
        print(f"| {mask} | {ranks} | {kind} | {peak / 1024:.0f} | {seconds:.1f} |", flush=True)


def torch_itself() -> None:
    """Whether torch's own context parallelism runs here."""
    (text,) = launch(1, "torch", "causal", "sdpa", TOKENS)
    print(f"torch.distributed.tensor.experimental.context_parallel on CPU: {text}")


def launch(ranks: int, kind: str, mask: str, attention: str, tokens: int) -> list:
    """Run a fresh group of processes, and return what each measured."""
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        settings = (ranks, kind, mask, attention, tokens, f"{folder}/store", results)
        running = [context.Process(target=measure, args=(rank, *settings)) for rank in range(ranks)]
        for process in running:
            process.start()
        measured = [results.get() for _ in running]
        for process in running:
            process.join()
    return measured


def measure(rank: int, ranks: int, kind: str, mask: str, attention: str, many: int, meeting: str, results) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(meeting, ranks))
    if kind == "torch":
        results.put(try_torch())
        os._exit(0)
    shape, names = ((ranks // 2, 2), ("cp_p2p", "cp_a2a")) if kind == "a2a+p2p" else ((ranks,), ("cp",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = build(mask, attention, many)
    if kind in COMM_TYPES:
        apply_cp(model, mesh, kind)
    for tokens in (16 * ranks, many):  # a small step first, for what is allocated once
        ids = torch.arange(tokens)[None] % 64
        positions = torch.arange(tokens)[None] % (tokens * 3 // 16 if mask == "documents" else tokens)
        shard = shard_batch({"input_ids": ids, "labels": ids, "position_ids": positions}, mesh)
        dist.barrier()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with Bytes() as forward:
            logits = model(input_ids=shard["input_ids"], position_ids=shard["position_ids"], use_cache=False).logits
        forward.sent -= shard["position_ids"].nbytes * (ranks - 1)  # of the whole forward, not of a layer
        loss = shard_loss(logits, shard)
        with Bytes() as backward:
            loss.backward()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.put((forward.sent, backward.sent, peak, seconds))
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


def build(mask: str, attention: str, tokens: int):
    kind, window = ("mistral", {"sliding_window": tokens // 16}) if mask == "window" else ("llama", {})
    config = transformers.AutoConfig.for_model(
        kind, num_hidden_layers=1, hidden_size=HEADS * WIDTH, intermediate_size=512, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, head_dim=WIDTH, vocab_size=64, max_position_embeddings=tokens,
        attn_implementation=attention, **window,
    )  # fmt: skip
    config.is_causal = mask != "full"
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def try_torch() -> str:
    from torch.distributed.tensor.experimental import context_parallel

    q = torch.randn(1, HEADS, 64, WIDTH, requires_grad=True)
    try:
        with context_parallel(init_device_mesh("cpu", (1,)), buffers=[q.detach()], buffer_seq_dims=[2]):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return "runs"


def ring() -> int:
    """Bytes that a rank sends in a ring's forward: all keys and values but those of the next rank."""
    return (RANKS - 1) * TOKENS // RANKS * 2 * KEY_HEADS * WIDTH * 4


def formula(kind: str, mask: str) -> float:
    """Bytes of a forward and backward, from sizes: of keys K, values V and heads H over P ranks."""
    mine, number = TOKENS // RANKS, 4 * WIDTH
    if kind == "all_gather":
        return 3 * (RANKS - 1) * mine * 2 * KEY_HEADS * number
    if kind == "p2p":
        return 3 * reached(RANKS, mask) * 2 * KEY_HEADS * number
    ranks = RANKS if kind == "a2a" else 2
    key_heads = math.lcm(KEY_HEADS, ranks)
    exchanged = 2 * (ranks - 1) / ranks * mine * 2 * (HEADS + key_heads) * number
    return exchanged + (3 * reached(RANKS // 2, mask) * 2 * key_heads // 2 * number if kind == "a2a+p2p" else 0)


def reached(ranks: int, mask: str) -> float:
    """Tokens whose keys a rank sends, on average."""
    if mask == "causal":
        return 0.75 * (ranks - 1) * TOKENS / ranks
    if mask == "full":
        return (ranks - 1) * TOKENS / ranks
    # Every chunk but the first reaches back, and the middle one to a chunk of its own rank.
    starts = [chunk * TOKENS // (2 * ranks) for chunk in range(1, 2 * ranks) if chunk != ranks]
    return sum(TOKENS // 16 - 1 if mask == "window" else start % (TOKENS * 3 // 16) for start in starts) / ranks


if __name__ == "__main__":
    main()
