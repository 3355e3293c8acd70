"""The best layouts for a reader, and for a program."""

from __future__ import annotations

import itertools
from typing import Any

from planning.layouts import Job
from planning.machine import Machine
from planning.memory import Memory
from planning.model import Planned
from planning.search import Found, Search

AXES = {"tp": "tensor", "ep": "expert", "cp": "context", "dp": "data", "replicas": "replica", "pp": "pipeline"}


def table(planned: Planned, machine: Machine, job: Job, search: Search, memory: float, command: str) -> str:
    """The best ten, and why each is before the next."""
    lines = [
        f"{planned.name}: {planned.parameters / 1e9:.2f} B parameters on {job.ranks:,} ranks of {machine.name}",
        f"{job.batch} x {job.seq_len} tokens a step, {_bytes(memory)} a rank; {machine.source}",
        "",
        f"{'':>2}  {'tokens/s':>8}  {'MFU':>5}  {'peak':>9}  {'waits':>5}  {'idle':>5}  layout",
    ]
    for number, found in enumerate(search.found, 1):
        waits = sum(found.time.exposed.values()) / found.time.seconds
        lines.append(
            f"{number:>2}  {found.tokens_per_second:>8,.0f}  {found.utilisation:>5.1%}  "
            f"{_bytes(found.memory.peak):>9}  {waits:>5.1%}  {found.time.bubble:>5.1%}  {found.layout}"
        )
    lines += ["", "tokens/s and MFU are of a rank; waits: share of the step in which compute waits for messages"]
    best = search.found[0]
    lines += ["", "1 in parts", *_indented(_memory_lines(best.memory) + _time_lines(best)), ""]
    lines += [f"{number} before {number + 1}: {reason(a, b)}" for number, (a, b) in enumerate(_pairs(search.found), 1)]
    lines += ["", "start 1 with", f"  {start(command, best, job)}"]
    lines += [f"  ({note})" for note in notes(search)]
    return "\n".join(lines)


def reason(better: Found, worse: Found) -> str:
    """Where most of the difference in time is, in a sentence."""
    a, b = _shares(better), _shares(worse)
    gain = worse.time.seconds - better.time.seconds
    if gain <= 1e-3 * better.time.seconds:
        return f"the same time, and {_bytes(better.memory.peak)} instead of {_bytes(worse.memory.peak)}"
    what = max(a.keys() | b.keys(), key=lambda key: b.get(key, 0.0) - a.get(key, 0.0))
    saved = b.get(what, 0.0) - a.get(what, 0.0)
    faster = gain / better.time.seconds
    return f"{faster:.1%} faster; {what} takes {_seconds(saved)} less of {_seconds(worse.time.seconds)}"


def as_data(planned: Planned, machine: Machine, job: Job, search: Search, command: str) -> dict[str, Any]:
    """For a program: numbers in bytes and seconds."""
    return {
        "model": planned.name,
        "parameters": planned.parameters,
        "machine": machine.name,
        "ranks": job.ranks,
        "batch": job.batch,
        "seq_len": job.seq_len,
        "looked": search.looked,
        "layouts": [
            {
                **vars(found.layout),
                "seconds": found.time.seconds,
                "tokens_per_second_and_rank": found.tokens_per_second,
                "utilisation": found.utilisation,
                "peak": found.memory.peak,
                "memory": vars(found.memory),
                "exposed": found.time.exposed,
                "bubble": found.time.bubble,
                "optimizer_seconds": found.time.optimizer,
                "start": start(command, found, job),
            }
            for found in search.found
        ],
        "notes": notes(search),
    }


def start(command: str, found: Found, job: Job) -> str:
    """The line that starts the main job so."""
    nodes, each = max(1, job.ranks // job.per_node), min(job.ranks, job.per_node)
    launcher = f"torchrun --standalone --nproc-per-node {each}" if nodes == 1 else (
        f"torchrun --nnodes {nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint HEAD:29500"
    )  # fmt: skip
    return f"{launcher} docs/examples/train.py {command} {found.layout.arguments(job)}"


def notes(search: Search) -> list[str]:
    """What was left out, and why, the commonest first."""
    return [f"{number:,} left out: {why}" for why, number in search.refused.most_common(5)]


def nothing_fits(planned: Planned, job: Job, search: Search, memory: float) -> str:
    """What would: fewer tokens of a microbatch, recomputation and offload are in the smallest already or said."""
    if search.smallest is None:
        needed = 16 * planned.parameters
        return (
            f"{planned.name} fits no layout of {job.ranks} ranks with {_bytes(memory)}: weights, gradients and "
            f"optimizer alone take {_bytes(needed / job.ranks)} of each; take {_ranks(needed, memory)} ranks or more, "
            "or LoRA (--lora 16)"
        )
    layout, peak = search.smallest
    durable = peak.weights + peak.gradients + peak.optimizer
    hints = [f"{job.ranks * 2} ranks"] if job.batch % (job.ranks * 2) == 0 or job.batch >= job.ranks * 2 else []
    if peak.activations > durable:
        hints += [f"--seq-len {job.seq_len // 2}, half the tokens of a microbatch"]
    if not layout.stays_gathered and layout.ep == layout.cp == 1:
        hints += [f"offload (am_fsdp cpu_offload=True), which takes {_bytes(durable)} off the device"]
    return (
        f"{planned.name} fits no layout of {job.ranks} ranks with {_bytes(memory)}; the smallest is {layout} with "
        f"{_bytes(peak.peak)} ({'; '.join(_memory_lines(peak))}). What would fit: {', or '.join(hints)}"
    )


def _ranks(needed: float, memory: float) -> int:
    ranks = 1
    while needed / ranks > 0.8 * memory:
        ranks *= 2
    return ranks


def _shares(found: Found) -> dict[str, float]:
    time = found.time
    shares = {f"waiting for {AXES[axis]} messages": waits for axis, waits in time.exposed.items()}
    return shares | {
        "compute": time.compute,
        "the update": time.optimizer,
        "idle time of the pipeline": time.bubble * time.seconds,
    }


def _memory_lines(memory: Memory) -> list[str]:
    return [
        f"weights {_bytes(memory.weights)}",
        f"gradients {_bytes(memory.gradients)}",
        f"optimizer {_bytes(memory.optimizer)}",
        f"gathered weights {_bytes(memory.gathered)}",
        f"activations {_bytes(memory.activations)}",
    ]


def _time_lines(found: Found) -> list[str]:
    time = found.time
    lines = [f"step {_seconds(time.seconds)}", f"compute {_seconds(time.compute)}"]
    lines += [f"waiting for {AXES[axis]} messages {_seconds(waits)}" for axis, waits in time.exposed.items() if waits]
    lines += [f"idle {time.bubble:.1%}"] * (found.layout.pp > 1)
    return [*lines, f"update {_seconds(time.optimizer)}"]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _pairs(found: list[Found]) -> list[tuple[Found, Found]]:
    return list(itertools.pairwise(found))


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _bytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
