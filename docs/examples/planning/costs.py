"""What one layer of each kind, and the rest of the model, take: counted by running them on nothing.

A twin with one layer of each kind, laid out by the real tensor plan and recomputation, runs forward, loss and backward
with fake tensors on a fake process group. Every operator is booked to the layer that it belongs to: FLOPs and bytes by
kernel class, messages by axis, and by the ledger of `am_fsdp` what stays alive from the forward to the backward.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import am_fsdp
import am_moe
import am_tp_plans
from am_fsdp._torch_compat import init_fake_process_group
from am_fsdp.ledger import Ledger
from planning.attention import fuse_attention
from planning.model import Planned
from training.model import main_output, next_token_loss
from verifying.model import takes

REST = -1  # what is no layer: embedding, final norm, head, loss
EXPERTS = 1000  # added to the kind of a layer: its routed experts
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Work(NamedTuple):
    """A kernel: its class, floating-point operations, bytes read and written, and the smallest side of a product."""

    kind: str
    flops: float
    bytes: float
    side: int = 0


@dataclass
class Share:
    """Forward or backward of a layer, for one sequence.

    Attributes:
        work: kernels and how many of each.
        operators: that the host launches, those that only look at a tensor anew among them.
        messages: over the tensor axis: kind and bytes of the whole tensor, and how many.
        transient: most bytes alive at once beyond those at its start.
        keys_values: bytes of keys and values that its attention read.
    """

    work: Counter[Work] = field(default_factory=Counter)
    operators: int = 0
    messages: Counter[tuple[str, int]] = field(default_factory=Counter)
    transient: int = 0
    keys_values: int = 0

    @property
    def flops(self) -> float:
        return sum(work.flops * number for work, number in self.work.items())


@dataclass
class Part:
    """A layer of a kind, its experts, or what is no layer, on one rank of the tensor axis.

    Attributes:
        forward, backward: what they take for one sequence.
        kept: bytes that stay from the forward to the backward for one sequence.
        parameters: numbers in weights on this rank of the tensor axis, before the data axis shards them.
        trained: those of them that get gradients.
    """

    forward: Share = field(default_factory=Share)
    backward: Share = field(default_factory=Share)
    kept: int = 0
    parameters: int = 0
    trained: int = 0


@dataclass(frozen=True)
class Costs:
    """Parts by kind; `REST` is what is no layer, `EXPERTS` + a kind are the routed experts of such a layer.

    Attributes:
        before, after: numbers in the weights of the embedding, and of the final norm and the head.
        hidden: bytes of a sequence's hidden state between layers.
        width: of the hidden state; elements of a token's row.
        seq_len: the length that was traced.
        recomputed: whether a layer's forward runs again in its backward.
    """

    parts: dict[int, Part]
    before: int
    after: int
    hidden: int
    width: int
    seq_len: int
    recomputed: bool = False


def count_costs(
    planned: Planned,
    *,
    seq_len: int,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: str | bool = False,
    keep_experts: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    plan: dict[str, Any] | None = None,
) -> Costs:
    """Trace one sequence through the twin.

    Args:
        planned: of `plan_for`.
        seq_len: tokens of the sequence.
        tp, sequence_parallel, recompute: as in `am_fsdp.fsdp2_strategy_parallelize`.
        keep_experts: leave routed experts whole, as an expert axis does.
        dtype: to compute in.
        plan: the model's tensor plan, where it is known already.

    Raises:
        ValueError: what the layout refuses; a forward that depends on values.
    """
    twin = planned.twin().to(dtype)
    init_fake_process_group(tp)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
        with warnings.catch_warnings(), fake:
            warnings.simplefilter("ignore")
            twin.to_empty(device="cpu")
        if tp > 1:
            plan = plan or am_tp_plans.resolve_plan(twin, sequence_parallel=sequence_parallel)
            experts = [e.name for e in am_moe.describe_experts(twin)] if keep_experts else []
            am_tp_plans.apply_plan(twin, mesh, {key: style for key, style in plan.items() if not _inside(key, experts)})
        am_fsdp.checkpoint_layers(twin, recompute)
        fuse_attention(twin)  # after the plan, which is derived from the model's own
        return replace(_traced(twin, planned, mesh, fake, seq_len), recomputed=recompute in (True, "full"))
    finally:
        dist.destroy_process_group()


def _inside(key: str, experts: list[str]) -> bool:
    levels = key.split(".")
    return any(
        len(levels) >= len(name.split("."))
        and all(k in ("*", n) for k, n in zip(levels, name.split("."), strict=False))
        for name in experts
    )


def _traced(twin: Any, planned: Planned, mesh: Any, fake: FakeTensorMode, seq_len: int) -> Costs:
    recorder = Recorder(mesh)
    layers = list(twin.get_submodule(planned.stack))
    parts: dict[int, Part] = {REST: Part()}
    found = {e.name: e for e in am_moe.describe_experts(twin)}
    hidden = [0, 0]
    for kind, layer in enumerate(layers):
        parts[kind] = Part()
        recorder.follow(layer, (kind,))
        for name, module in layer.named_modules():
            if f"{planned.stack}.{kind}.{name}" in found:
                parts[EXPERTS + kind] = Part()
                recorder.follow(module, (kind, EXPERTS + kind))
    layers[0].register_forward_hook(lambda _m, _a, out: hidden.__setitem__(slice(None), _size(out, seq_len)))
    local = [_local(p) for p in twin.parameters()]
    recorder.hold(*local, *twin.buffers())
    recorder.begin()
    settings = {"use_cache": False} if takes(twin, "use_cache") else {}
    twin.train()
    with fake:
        ids = torch.zeros(1, seq_len, dtype=torch.int64)
        try:
            with recorder:
                loss = next_token_loss(main_output(twin(ids, **settings)), ids)
                recorder.end_forward()
                loss.backward()
                recorder.end_backward()
        except RuntimeError as error:
            if type(error).__name__ not in ("DataDependentOutputException", "DynamicOutputShapeException"):
                raise
            raise ValueError(f"the forward of {planned.name} depends on values ({error})") from error
    for (place, phase), share in recorder.shares.items():
        setattr(parts[place], phase, share)
    for place, kept in recorder.kept.items():
        parts[place].kept = kept
    for name, parameter in twin.named_parameters():
        place = next((k for k in range(len(layers)) if name.startswith(f"{planned.stack}.{k}.")), REST)
        owner = name.rpartition(".")[0]
        if any(owner == n or owner.startswith(f"{n}.") for n in found):
            place += EXPERTS
        number = _local(parameter).numel()
        parts[place].parameters += number
        parts[place].trained += number * parameter.requires_grad
    embedding = twin.get_input_embeddings() if hasattr(twin, "get_input_embeddings") else None
    before = sum(_local(p).numel() for p in embedding.parameters()) if embedding is not None else 0
    head = twin.get_output_embeddings() if hasattr(twin, "get_output_embeddings") else None
    tied = (
        head is not None
        and embedding is not None
        and {id(p) for p in head.parameters()} & {id(p) for p in embedding.parameters()}
    )
    rest = parts[REST].parameters
    return Costs(parts, before, rest - (0 if tied else before), hidden[0], hidden[1], seq_len)


class Recorder(Ledger):
    """A ledger that books every operator to a place: the module it runs in, and forward or backward."""

    def __init__(self, mesh: Any) -> None:
        super().__init__(mesh)
        self.shares: dict[tuple[int, str], Share] = {}
        self.kept: dict[int, int] = {}
        self._stack: list[tuple[int, ...]] = [(REST,)]
        self._phase = "forward"
        self._begun: dict[tuple[int, str], int] = {}

    def begin(self) -> None:
        """After what was there before is held."""
        self._enter(REST)

    def follow(self, module: nn.Module, path: tuple[int, ...]) -> None:
        """Book what runs in a module to the last of `path`; those before are the modules around it."""
        place = path[-1]

        def before(_module: Any, args: Any, kwargs: Any) -> None:
            self._stack.append(path)
            if self._phase == "forward":
                self._enter(place)
                self._hook((args, kwargs), path[:-1] or (REST,), {path})

        def after(_module: Any, _args: Any, output: Any) -> None:
            self._stack.pop()
            if self._phase == "forward":
                self.kept[place] = self._total - self._begun[place, "forward"]
                self._hook(output, path, None)

        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        module.register_forward_hook(after, always_call=True)

    def end_forward(self) -> None:
        self.kept[REST] = (
            self._total
            - self._begun[REST, "forward"]
            - sum(kept for place, kept in self.kept.items() if place < EXPERTS)
        )
        self._phase = "backward"
        self._enter(REST)

    def end_backward(self) -> None:
        self._phase = "over"

    def _hook(self, tensors: Any, path: tuple[int, ...], leaving: set[tuple[int, ...]] | None) -> None:
        """When the gradient of a tensor comes, its backward is at `path`, if it was in what it leaves."""

        def move(_gradient: torch.Tensor) -> None:
            if self._phase == "backward" and (leaving is None or self._stack[-1] in leaving):
                self._stack[-1] = path
                self._enter(path[-1])

        for tensor in _tensors_in(tensors):
            if tensor.requires_grad and tensor.dim() >= 2:
                tensor.register_hook(move)
                return

    def _enter(self, place: int) -> None:
        if (place, self._phase) not in self._begun:
            self._begun[place, self._phase] = self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func._schema.name == "aten::_grouped_mm":
            func = GroupedProduct(func)
        before = self.peak
        self.peak = 0
        output = super().__torch_dispatch__(func, types, args, kwargs)
        now, self.peak = max(self.peak, self._total), max(before, self.peak)
        path = self._stack[-1]
        share = self.shares.setdefault((path[-1], self._phase), Share())
        share.operators += 1
        for place in path:
            around = self.shares.setdefault((place, self._phase), Share())
            around.transient = max(around.transient, now - self._begun.get((place, self._phase), 0))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            kind = next((k for k in ("reduce_scatter", "all_gather", "all_reduce", "all_to_all") if k in name), None)
            if kind:
                sizes = [t.nbytes for t in _tensors_in((args, output))]
                share.messages[kind, max(sizes)] += 1
        elif (work := _work_of(func, name, args, output)) is not None:
            share.work[work] += 1
            if work.kind == "attention":
                share.keys_values += sum(t.nbytes for t in list(_tensors_in(args))[1:3])
        return output


class GroupedProduct:
    """torch's grouped product for fake tensors of any dtype: on a CPU it takes float32, in a trace bfloat16 alone."""

    def __init__(self, func: Any) -> None:
        self._func, self._schema = func, func._schema

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        half = [a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return self._func(*half, **kwargs | {"out_dtype": None}).to(args[0].dtype)


def _work_of(func: Any, name: str, args: Any, output: Any) -> Work | None:
    """What a kernel does; None for an operator that computes nothing."""
    tensors = list(_tensors_in(args))
    outputs = list(_tensors_in(output))
    inputs = {t.untyped_storage()._cdata for t in tensors}
    if not outputs or (all(t.untyped_storage()._cdata in inputs for t in outputs) and not func._schema.is_mutable):
        return None  # a view
    if name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"):
        return None
    moved = float(sum(t.nbytes for t in {id(t): t for t in (*tensors, *outputs)}.values()))
    if name in PRODUCTS:
        first, second = (t for t in (tensors[-2], tensors[-1]))
        rows, inner, columns = first.shape[-2], first.shape[-1], second.shape[-1]
        batch = first.shape[0] if first.dim() == 3 else 1
        return Work("product", 2.0 * batch * rows * inner * columns, moved, min(rows, inner, columns))
    if name == "_grouped_mm":
        first, second = tensors[0], tensors[1]
        if first.dim() == 2 and second.dim() == 3:
            flops, side = 2.0 * first.shape[0] * second.shape[1] * second.shape[2], min(second.shape[1:])
        elif first.dim() == 2:
            flops, side = 2.0 * first.shape[0] * first.shape[1] * second.shape[1], min(first.shape[0], second.shape[1])
        else:
            flops, side = 2.0 * math.prod(first.shape) * second.shape[-1], min(first.shape[1:])
        return Work("grouped", flops, moved, int(side))
    if "scaled_dot_product" in name or "flash_attention" in name:
        backward = "backward" in name
        query, key, value = tensors[1:4] if backward else tensors[0:3]
        causal = any(argument is True for argument in args)
        pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * (0.5 if causal else 1.0)
        widths = query.shape[3] + value.shape[3]
        return Work(
            "attention backward" if backward else "attention",
            (5.0 if backward else 2.0) * pairs * widths,
            moved,
            query.shape[3],
        )
    if name in ("embedding", "index", "gather", "index_select"):
        moved = 2.0 * sum(t.nbytes for t in outputs)
    return Work("element-wise", 0.0, moved)


def scaled(share: Share, by: float) -> Share:
    """The same for another number of tokens, of sequences as long or of a context rank's part of one."""
    work: Counter[Work] = Counter()
    for one, number in share.work.items():
        work[one._replace(flops=one.flops * by, bytes=one.bytes * by)] += number
    messages = Counter({(kind, int(size * by)): number for (kind, size), number in share.messages.items()})
    return dataclasses.replace(
        share,
        work=work,
        messages=messages,
        transient=int(share.transient * by),
        keys_values=int(share.keys_values * by),
    )


def _size(output: Any, seq_len: int) -> tuple[int, int]:
    tensor = next(_tensors_in(output))
    return tensor.nbytes, tensor.shape[-1]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
