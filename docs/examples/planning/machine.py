"""What a machine can do, in the few numbers that the time of a step is made of; measured, or from its data sheet."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import pathlib
import re
from dataclasses import dataclass

from planning.costs import Work


@dataclass(frozen=True)
class Link:
    """Between two ranks: bytes per second that one of them sends while it receives as much, and seconds to begin."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """A node of a cluster.

    Attributes:
        name, source: what it is, and where the numbers are from.
        memory: bytes of a rank.
        peak: FLOP/s on the data sheet, in the dtype to compute in; for utilisation alone.
        products: FLOP/s of matrix products by the logarithm of their FLOPs, in rising order.
        grouped, attention, attention_backward: the share of the rate of a product of the same size that these reach.
        moving: bytes per second of element-wise kernels, read and written, by the logarithm of their bytes.
        kernel: seconds of the shortest kernel.
        forward_operator, backward_operator: seconds that the host takes for an operator, launched or only looked at:
            behind the modules of a forward, and in the backward, which is not Python.
        unit: seconds that the host takes for a unit of FSDP2 to be gathered, or its gradient to be reduced.
        inside, across: links of ranks of a node, and of different nodes.
        overlap: of device, host and messages beside each other, the share that costs no time; 0 where they share cores.
        at_once: how many of the ranks of a node compute at the same time; 0 for all.
        per_node: ranks of a node.
    """

    name: str
    source: str
    memory: float
    peak: float
    products: tuple[tuple[float, float], ...]
    grouped: float
    attention: float
    attention_backward: float
    moving: tuple[tuple[float, float], ...]
    kernel: float
    forward_operator: float
    backward_operator: float
    unit: float
    inside: Link
    across: Link
    overlap: float = 1.0
    at_once: int = 0
    per_node: int = 8

    def beside(self, one: float, other: float) -> float:
        """Seconds of two things that go on beside each other as far as this machine can."""
        return max(one, other) + (1 - self.overlap) * min(one, other)

    def seconds(self, work: Work) -> float:
        """Of a kernel on the device."""
        if work.kind == "element-wise":
            return max(self.kernel, work.bytes / _rate(self.moving, work.bytes))
        share = {"grouped": self.grouped, "attention": self.attention, "attention backward": self.attention_backward}
        rate = share.get(work.kind, 1.0) * _rate(self.products, work.flops)
        return max(self.kernel, work.flops / rate, work.bytes / self.bandwidth)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of large tensors."""
        return self.moving[-1][1]

    def message(self, kind: str, size: float, ranks: int, neighbours: int) -> float:
        """Seconds of a collective of `size` bytes over `ranks`, of which `neighbours` are on a node.

        It goes around a ring, a sum of few bytes over a tree. All ranks of a node have a link to the next node.
        """
        if ranks == 1 or size <= 0:
            return 0.0
        link = self.inside if neighbours >= ranks else self.across
        bandwidth = link.bandwidth if neighbours >= ranks else min(self.inside.bandwidth, link.bandwidth * neighbours)
        nodes = max(1, ranks // neighbours)
        hops = (nodes - 1) * self.across.latency + (neighbours - 1) * self.inside.latency / 4
        tree = 2 * math.ceil(math.log2(ranks)) * link.latency
        steps = 2 if kind == "all_reduce" else 1
        begun = min(2 * hops, tree) if kind == "all_reduce" else link.latency if kind == "all_to_all" else hops
        return link.latency + begun + steps * size * (ranks - 1) / ranks / bandwidth

    def point_to_point(self, size: float, same_node: bool) -> float:
        link = self.inside if same_node else self.across
        return link.latency + size / link.bandwidth

    def with_links(self, links: str) -> Machine:
        """Bandwidths inside a node and across nodes, such as `450GB/s,50GB/s`.

        Raises:
            ValueError: not two bandwidths.
        """
        found = links.split(",")
        if len(found) != 2:
            raise ValueError(f"--links {links!r} must be two bandwidths, inside a node and across: 450GB/s,50GB/s")
        inside, across = (quantity(text.strip().removesuffix("/s"), "--links") for text in found)
        return dataclasses.replace(
            self,
            inside=dataclasses.replace(self.inside, bandwidth=inside),
            across=dataclasses.replace(self.across, bandwidth=across),
        )


def _rate(table: tuple[tuple[float, float], ...], size: float) -> float:
    """Between two sizes that were measured, in proportion to the logarithm."""
    where = math.log10(max(size, 1.0))
    right = bisect.bisect([size for size, _ in table], where)
    if right in (0, len(table)):
        return table[min(right, len(table) - 1)][1]
    (x0, y0), (x1, y1) = table[right - 1], table[right]
    return y0 + (y1 - y0) * (where - x0) / (x1 - x0)


def quantity(text: str, what: str) -> float:
    """`80GiB`, `450GB`, `4M`, `8192`: powers of 1024 with an i, of 1000 without.

    Raises:
        ValueError: names `what`.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{what} {text!r} is no number such as 80GiB, 450GB/s or 4M")
    base = 1024 if match[3] else 1000
    return float(match[1]) * base ** " KMGT".index(match[2] or " ")


def save(machine: Machine, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=1))


def load(name: str) -> Machine:
    """One of `MACHINES`, or a file that `--calibrate` wrote.

    Raises:
        ValueError: neither.
    """
    if name in MACHINES:
        return MACHINES[name]
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"--machine {name!r} is neither a file of --calibrate nor one of {', '.join(MACHINES)}")
    values = json.loads(path.read_text())
    for link in ("inside", "across"):
        values[link] = Link(**values[link])
    for table in ("products", "moving"):
        values[table] = tuple((size, rate) for size, rate in values[table])
    return Machine(**values)


# Large products, memory and a unit were calibrated on the card; attention is by a profile, the host's operators by five
# steps (docs/benchmarks). Small and grouped products, small tensors, the shortest kernel and latencies are assumed.
# The links are 80 % of those of a DGX H100: NVLink 450 GB/s, and an adapter of 400 Gb/s for each card, each way.
_H100 = Machine(
    name="h100",
    source="an H100 SXM (80 GB HBM3) with torch 2.11; links by its data sheet",
    memory=80 * 2**30,
    peak=989e12,
    products=((8.4, 50e12), (9.3, 250e12), (10.2, 548e12), (11.1, 716e12), (12.0, 760e12)),
    grouped=0.7,
    attention=0.77,
    attention_backward=0.7,
    moving=((6.0, 1.0e12), (7.5, 2.5e12), (8.6, 2.83e12)),
    kernel=1.5e-6,
    forward_operator=21e-6,
    backward_operator=6e-6,
    unit=3.9e-4,
    inside=Link(360e9, 8e-6),
    across=Link(40e9, 15e-6),
)
# The cards of torchtitan's tables: HBM2e with 2.4 of 3.35 TB/s, and 500 of 700 W, which are assumed to leave products
# 80 % of their rate.
_H100_500W = dataclasses.replace(
    _H100,
    name="h100-500w",
    source="torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: 2.4 TB/s, 500 W",
    memory=96e9,
    products=tuple((size, rate * 0.8) for size, rate in _H100.products),
    moving=tuple((size, rate * 2.4 / 3.35) for size, rate in _H100.moving),
)
MACHINES = {machine.name: machine for machine in (_H100, _H100_500W)}
