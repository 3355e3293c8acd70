"""Try an experts module with numbers before it is spread: do its ranks together give what it gives whole?

T tokens      D model dim      K choices      E experts, the first four unless the module is small: P ranks of L each

Those experts of a module, with made-up parameters, run on a few tokens twice: once whole, by the module's own
forward, and once as P ranks would run them, each with its slice of the parameters and its rows, through the code of the
spread layer. Output, gradients and what the forward leaves at the module have to agree. No process group is needed, and
the module is afterwards what it was before::

    whole      forward(x_TD, ids_TK, weights_TK) with E experts
    rank 0     the rows that chose expert 0 or 1, with the first half of every stacked parameter  \\
    rank 1     the rows that chose expert 2 or 3, with the second half                            /  summed

Values are made up even where a module has its own: weights that start as zeros, or scales that start as ones, would
agree with anything.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path, tree_map

from am_moe.expert_parallel.calls import CALLS
from am_moe.expert_parallel.dispatch import Received
from am_moe.expert_parallel.experts import Experts, own_forward
from am_moe.expert_parallel.local_experts import run_local_experts

_WHAT_EXPERTS_ARE = (
    "Experts compute each row of their result from its own token alone, apply routing weights as they are and once, "
    "and return the sum over the choices with nothing added to it or done to it; they know no number of experts, "
    "choices or tokens, use no other expert's weights, and have what belongs to each expert in parameters. See "
    "am_moe.MoE"
)
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# How far results may be apart, of the largest number of their row; a row counts as this large at least, of all.
_TOLERANCE = {torch.float64: (1e-5, 1e-6), torch.float32: (1e-4, 1e-2), torch.bfloat16: (5e-2, 1.0)}
_TOLERANCE[torch.float16] = _TOLERANCE[torch.bfloat16]
_FEW = 1 << 20  # numbers in a module, up to which it is tried with all of its experts
_MANY = 1 << 22  # numbers in four experts, from which on there are two, in float32
_LENGTH = 65521  # of the made-up values, which repeat: a prime, so that no two rows or experts are alike
_OF_MODULES = set(vars(nn.Module())) - {"_buffers"}
_PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number")


def try_with_numbers(experts: Experts, module: nn.Module, ranks: int, device_type: str) -> None:
    """Refuse a module of which `ranks` ranks would together give something else than the module whole.

    Args:
        experts: what the module is.
        module: real or on the meta device; as it was when this returns.
        ranks: the size of the expert axis.
        device_type: where parameters that are on meta will be.

    Raises:
        ValueError: results differ, or the module's own forward fails.
    """
    name = experts.name or experts.kind
    owned = {p.device for p in module.parameters() if not p.is_meta}
    devices = list(dict.fromkeys([*owned, torch.device(device_type)]))
    failed: Exception | None = None
    for device, dtype, values in itertools.product(devices, _dtypes(module), ("of both signs", "positive")):
        with _alone(module, device):
            try:
                trial = _Trial(experts, module, ranks, device, dtype, values)
                trial.find_width()
                differs = trial.compare()
            except Exception as error:  # whatever the forward raises, it may run in another dtype or elsewhere
                failed = failed or error
                continue
        if not differs:
            return
        where = f"on {trial.ranks} ranks" if trial.ranks > 1 else "computed choice by choice"
        raise ValueError(
            f"the experts of {name} cannot be spread: tried with {trial.count} experts and made-up numbers {where}, "
            f"{differs}. {_WHAT_EXPERTS_ARE}"
        )
    raise ValueError(
        f"the experts of {name} cannot be tried with made-up numbers, so that it is not known whether they can be "
        f"spread: their own forward fails with {type(failed).__name__}: {failed}. {_WHAT_EXPERTS_ARE}"
    ) from failed


def signature(module: nn.Module) -> tuple:
    """The same for modules of which one needs to be tried: class, shapes, and values other than a layer's number."""
    found: list[Any] = [vars(module).get("forward")]
    for path, part in module.named_modules():
        tensors = [*part._parameters.items(), *part._buffers.items()]
        found.append((path, type(part), *((n, t.shape, t.dtype) for n, t in tensors if t is not None)))
        for key, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                found.append((path, key, value.shape, value.dtype))
            elif key not in _OF_MODULES and key not in _PLACES and isinstance(
                value, (bool, int, float, str, list, tuple, dict, set)
            ):  # fmt: skip
                found.append((path, key, repr(value)))
            elif callable(value) and not isinstance(value, nn.Module):
                found.append((path, key, id(value)))
    return tuple(found)


@contextmanager
def _alone(module: nn.Module, device: torch.device) -> Iterator[None]:
    """With gradients, without autocast or another default device; random numbers and the module stay as they were."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(device)
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cpu":
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        stack.enter_context(_unchanged(module))
        yield


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """The attributes of a module and its parts, lists and dicts among them, are afterwards what they were."""
    before = []
    for part in module.modules():
        containers = {n: copy.copy(v) for n, v in vars(part).items() if isinstance(v, (dict, list, set, deque))}
        before.append((part, dict(vars(part)), containers))
    try:
        yield
    finally:
        for part, attributes, containers in before:
            vars(part).clear()
            vars(part).update(attributes)
            for name, contents in containers.items():
                held: Any = attributes[name]
                held.clear()
                (held.extend if isinstance(held, (list, deque)) else held.update)(contents)


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    """Those in which to try: an exact one, and that of the parameters where the forward runs in no other."""
    own = [p.dtype for p in module.parameters() if p.dtype in _PLAIN]
    first = [torch.float32] if sum(p.numel() for p in module.parameters()) > _MANY else [torch.float64, torch.float32]
    return list(dict.fromkeys([*first, *own]))


@dataclass
class _Values:
    """Made-up numbers, the same for the same order of calls."""

    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        uniform = torch.rand(_LENGTH, generator=generator, dtype=torch.float32, device="cpu")
        self.of_both_signs = torch.randn(_LENGTH, generator=generator, dtype=torch.float32, device="cpu")
        self.positive = uniform + 0.5
        self.used = 0

    def make(self, shape: tuple[int, ...], positive: bool, scale: float = 1.0, dtype: torch.dtype | None = None):
        number = torch.Size(shape).numel()
        self.used += 7919
        first = (self.positive if positive else self.of_both_signs).roll(self.used) * scale
        first = first.to(self.device, dtype or self.dtype)
        whole = first.view(torch.uint8).repeat(-(-number // _LENGTH)).view(first.dtype)
        return whole[:number].clone().view(shape)


class _Trial:
    """A module with the first few experts and made-up numbers, in one dtype on one device; inside of `_alone`.

    Args:
        values: whether parameters are `of both signs` or, for forwards that take roots of them, `positive`.
    """

    def __init__(
        self, experts: Experts, module: Any, ranks: int, device: torch.device, dtype: torch.dtype, values: str
    ) -> None:
        number = sum(p.numel() for p in module.parameters())
        most = experts.num_experts if number <= _FEW else 2 if 4 * number > _MANY * experts.num_experts else 4
        self.local = min(experts.num_experts // ranks, max(1, most // min(ranks, 2)))
        self.ranks = min(ranks, max(1, most // self.local))
        self.count = self.local * self.ranks
        self.module, self.whole = module, experts
        self.experts = replace(experts, num_experts=self.count)
        self.values, self.positive = _Values(device, dtype), values == "positive"
        self._fill()

    def _fill(self) -> None:
        """Put made-up numbers in the place of everything that the module has."""
        vars(self.module).pop("when_computed", None)  # the counter of `ExpertLoad`
        setattr(self.module, self.experts.counter, self.count)
        stacked = {id(self.module.get_parameter(path)): rows for path, rows in self.experts.stacked.items()}
        made: dict[int, torch.Tensor] = {}
        for part in self.module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and id(parameter) not in made:
                    made[id(parameter)] = self._parameter(parameter, stacked.get(id(parameter)))
                if parameter is not None:
                    part._parameters[name] = made[id(parameter)]
            for held in (part._buffers, vars(part)):
                for name, value in held.items():
                    if isinstance(value, torch.Tensor):
                        held[name] = self._buffer(value)
                    elif isinstance(value, (list, tuple)) and len(value) == self.whole.num_experts:
                        held[name] = self._entries(value)
            if isinstance(part, nn.ModuleList) and len(part) == self.whole.num_experts:
                part._modules.update(zip(part._modules, self._entries([*part]), strict=False))
        self.parameters = dict(self.module.named_parameters())

    def _parameter(self, parameter: torch.Tensor, rows: int | None) -> nn.Parameter:
        shape = tuple(parameter.shape) if rows is None else (self.count * rows, *parameter.shape[1:])
        if not parameter.is_floating_point():
            known = torch.zeros(shape, dtype=parameter.dtype) if parameter.is_meta else parameter[: shape[0]].clone()
            return nn.Parameter(known.to(self.values.device), requires_grad=False)
        plain = parameter.dtype in _PLAIN
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        made = self.values.make(shape, self.positive, scale, self.values.dtype if plain else parameter.dtype)
        return nn.Parameter(made, requires_grad=plain)

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        of_each = tensor.shape[:1] == (self.whole.num_experts,)
        shape = (self.count, *tensor.shape[1:]) if of_each else tuple(tensor.shape)
        if tensor.is_floating_point():
            return self.values.make(shape, True, 1.0, self.values.dtype if tensor.dtype in _PLAIN else tensor.dtype)
        if of_each and tensor.dim() == 1 and not tensor.is_complex() and tensor.dtype is not torch.bool:
            return torch.arange(self.count, dtype=tensor.dtype).flip(0)
        known = torch.zeros(shape, dtype=tensor.dtype) if tensor.is_meta else tensor[: shape[0]] if shape else tensor
        return known.detach().clone().to(self.values.device)

    def _entries(self, entries: Any) -> Any:
        """An entry for each expert here, as different as those of all experts are."""
        kinds: dict[str, Any] = {}
        for entry in entries:
            kinds.setdefault(repr(entry), entry)
        kept = [*kinds.values()][: self.count]
        return type(entries)([*kept, *[kept[0]] * (self.count - len(kept))])

    def find_width(self) -> None:
        """Make inputs of the width that the module takes, which its parameters and attributes are asked for."""
        of_each = self.experts.stacked
        sizes = [size for path, p in self.parameters.items() for size in p.shape[1 if path in of_each else 0 :]]
        said = [getattr(self.module, name, None) for name in ("hidden_size", "hidden_dim")]
        others = [v for v in vars(self.module).values() if isinstance(v, int) and not isinstance(v, bool)]
        widths = sorted(dict.fromkeys(sizes), key=lambda size: (size not in said, -sizes.count(size)))
        widths += [value for value in others if 0 < value < 65536]
        failed: Exception | None = None
        for width in dict.fromkeys(widths):
            self._make_inputs(width)
            try:
                with _unchanged(self.module), torch.no_grad():
                    out = self._forward()
                if not torch.isfinite(out).all():
                    raise ValueError("it returns numbers that are not finite")
                return
            except Exception as error:  # another width may be the one
                failed = failed or error
        raise failed or ValueError("it has no parameters with a width")

    def _make_inputs(self, width: int) -> None:
        numbers, self.inputs = self.values, []
        if self.experts.call == "routed":
            chosen = [expert for expert in range(self.count) if expert != 2]  # nobody wants expert 2
            steps = dict.fromkeys(step for step in (1, len(chosen) // 2, len(chosen) - 1) if step)
            pairs = [(one, chosen[(n + step) % len(chosen)]) for step in steps for n, one in enumerate(chosen)]
            pairs = pairs[:: -(-len(pairs) // 96)] or [(0,)]
            ids = list(itertools.islice(itertools.cycle(pairs), max(7, len(pairs) + 1)))
            if self.experts.identity and self.count > 1:
                ids += [(0, self.count), (self.count, 1)]  # an id that means the token itself
            ids_TK = torch.tensor(ids, device=numbers.device)
            weights_TK = numbers.make(tuple(ids_TK.shape), positive=True, scale=0.4).requires_grad_()
            x_TD = numbers.make((len(ids), width), positive=False)
            if not self.positive:  # rows of other sizes meet bounds and activations that others do not
                x_TD[2] *= 50
                x_TD[4:6] *= torch.tensor([[10.0], [0.1]], device=numbers.device, dtype=numbers.dtype)
            self.inputs = [x_TD.requires_grad_(), ids_TK, weights_TK]
        elif self.experts.call == "rows":
            x_ND = numbers.make((self.count * 3, width), positive=False)
            x_ND[torch.arange(len(x_ND)) % 3 == 1] = 0
            x_ND[6:9] = 0
            self.inputs = [x_ND.requires_grad_()]
        else:
            sizes = list(itertools.islice(itertools.cycle([3, 2, 0, 2]), self.count))
            self.inputs = [numbers.make((sum(sizes), width), positive=False).requires_grad_(), sizes]
        self.named = dict(zip(self.experts.arguments, self.inputs, strict=True))

    def _forward(self) -> torch.Tensor:
        out, rows = own_forward(self.module)(*self.inputs), self.inputs[0]
        alike = isinstance(out, torch.Tensor) and (self.experts.call == "linear" or out.numel() == rows.numel())
        if not alike or len(out) != len(rows):
            raise TypeError(f"it returns {getattr(out, 'shape', type(out))} for inputs {tuple(rows.shape)}")
        return out.reshape(len(rows), -1)

    def compare(self) -> str:
        """What differs between the whole module and its ranks, in words; nothing if all agrees."""
        seen: list[Any] = []
        for training in (True, False):
            for part in self.module.modules():
                part.training = training
            before = _state(self.module)
            with _unchanged(self.module):
                out, left = self._forward(), _state(self.module)
            new = {n: value for n, value in left.items() if n not in before or not _same(value, before[n])}
            for name, value in new.items():
                if name.endswith("()"):
                    return f"its forward changes the buffer {name.removesuffix('()')}, which each rank has for itself"
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    return (
                        f"its forward leaves {name}, which has gradients, at the module, where it is of a rank's part"
                    )
            if seen and _same(out, seen[0]) and new.keys() == seen[1].keys():
                continue  # it does in evaluation what it does in training
            seen = [out.detach(), new]
            if differs := self._compare_with_ranks(out, left, new):
                if not self._is_random(out):
                    return differs
                if not training:
                    return "its forward gives another result every time"
        return ""

    def _is_random(self, out: torch.Tensor) -> bool:
        with _unchanged(self.module), torch.no_grad():
            return not _same(self._forward(), out)

    def _compare_with_ranks(self, out: torch.Tensor, left: dict[str, Any], new: dict[str, Any]) -> str:
        upstream = self.values.make(tuple(out.shape), positive=False).to(out.dtype)
        known = {n: p for n, p in self.parameters.items() if p.requires_grad}
        given = {n: x for n, x in self.named.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        whole: dict[str, torch.Tensor] = {}
        with suppress(Exception):  # a forward without a backward, as kernels for inference have
            whole = _gradients(out, given | known, upstream)
        if not all(bool(torch.isfinite(whole[name]).all()) for name in given if whole):
            raise ValueError("it has gradients that are not finite")
        slices: list[dict[str, nn.Parameter]] = []
        states: list[dict[str, Any]] = []
        found: dict[str, torch.Tensor] = {}
        try:
            spread = CALLS[self.experts.call](self._through(slices, states), self.experts, *self.inputs)
            parts = {f"{n} {rank}": p for rank, each in enumerate(slices) for n, p in each.items() if p.requires_grad}
            leaves = given | {n: p for n, p in known.items() if n not in self.experts.stacked} | parts
            if whole:
                found = _gradients(spread, leaves, upstream.to(spread.dtype) * self.ranks)
        except Exception as error:
            return f"its forward fails with {type(error).__name__}: {error}"
        if error := _apart(spread, out, self.values.dtype, by_row=True):
            return f"its output is off by {error:.1e}"
        for name, wanted in whole.items():
            if name in self.experts.stacked:
                pairs = [(found[f"{name} {rank}"], part) for rank, part in enumerate(wanted.chunk(self.ranks))]
            else:
                pairs = [(found[name] / self.ranks, wanted)]
            for mine, part in pairs:
                if error := _apart(mine, part, self.values.dtype, by_row=name == self.experts.arguments[0]):
                    return f"the gradient of {name} is off by {error:.1e}"
        for state, name in itertools.product(states, new):
            if name not in state or not _same(state[name], left[name]):
                return f"its forward leaves {name} at the module, where it is of a rank's part"
        return ""

    def _through(self, slices: list[dict[str, nn.Parameter]], states: list[dict[str, Any]]):
        """The ranks, one after the other, in the place of a dispatcher."""

        def through(x_TD, ids_TK, weights_TK):
            total = None
            for rank in range(self.ranks):
                ids = ids_TK - rank * self.local
                ids = torch.where((ids < 0) | (ids > self.local), self.local, ids).int()
                needed = (ids < self.local).any(-1).nonzero().squeeze(-1)
                received = Received(x_TD[needed], ids[needed], weights_TK[needed], None)
                with _unchanged(self.module):
                    slices.append(self._take_slices(rank))
                    out = run_local_experts(self.module, self.experts, self.local, 1 / self.ranks, received)
                    if len(needed):
                        states.append(_state(self.module))
                part = out.new_zeros(len(x_TD), *out.shape[1:]).index_add(0, needed, out)
                total = part if total is None else total + part
            return total

        return through

    def _take_slices(self, rank: int) -> dict[str, nn.Parameter]:
        taken = {}
        for path, rows in self.experts.stacked.items():
            prefix, _, leaf = path.rpartition(".")
            each, parameter = self.local * rows, self.parameters[path]
            part = parameter.detach()[rank * each : (rank + 1) * each]
            taken[path] = nn.Parameter(part, requires_grad=parameter.requires_grad)
            self.module.get_submodule(prefix)._parameters[leaf] = taken[path]
        return taken


def _gradients(out: torch.Tensor, leaves: dict[str, torch.Tensor], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every leaf, zeros where it was not used."""
    if not out.requires_grad:
        return {n: torch.zeros_like(x) for n, x in leaves.items()}
    found = torch.autograd.grad(out, list(leaves.values()), upstream.view_as(out), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def _state(module: nn.Module) -> dict[str, Any]:
    """Copies of the numbers that a module and its parts hold beside parameters, by name; of buffers with `()`."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        held = {f"{name}()": tensor for name, tensor in part._buffers.items()}
        held |= {name: value for name, value in vars(part).items() if name not in _OF_MODULES | {"_buffers"}}
        for name, value in held.items():
            for place, leaf in tree_flatten_with_path(value)[0]:
                if isinstance(leaf, (torch.Tensor, bool, int, float)):
                    where = "".join(map(str, place))
                    copied = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, leaf)
                    found[f"{path}.{name}{where}".removeprefix(".")] = copied
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and a == b


def _apart(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, by_row: bool) -> float:
    """How far results are apart, relative to their size, or 0 if that is rounding."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    coarse = max((found.dtype, wanted.dtype, dtype), key=lambda d: torch.finfo(d).eps)
    tolerance, least = _TOLERANCE[coarse]
    if by_row:
        difference, size = (found.double() - wanted).abs().amax(-1), wanted.double().abs().amax(-1)
        error = (difference / size.clamp(min=max(least * size.max().item(), 1e-300))).max().item()
    else:  # in one pass each, as parameters are large
        size = torch.linalg.vector_norm(wanted, float("inf")).item()
        error = torch.dist(found.to(wanted.dtype), wanted, float("inf")).item() / max(size, 1e-300)
    return 0.0 if error <= tolerance else error
