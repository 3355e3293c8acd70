"""Run a model once without devices, as one rank of a tensor-parallel axis would, to see whether a plan is complete.

Every colwise projection returns only its rank's share of the features, every rowwise one takes only that. Projections
compute nothing and weights take no memory, so this costs the attention of a few tokens. What the model does in between
is watched operator by operator: what is computed with a rank's share is *sharded*, and so

- a whole parameter that meets it has only a part of its gradient on each rank, which has to be summed;
- a whole activation that meets it would have only a part of its gradient, a reduction over the sharded features, a
  sharded value that reaches a module or the output that wants all of it, or a shape that no longer fits would be
  wrong, and the plan is refused.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from am_tp_plans.experts import ExpertsOverTensorAxis
from am_tp_plans.local import LocalShards, MlaKvAProjection, ReplicatedWithGradAllReduce

_REDUCTIONS = ("mean", "sum", "var", "std", "amax", "amin", "max", "min", "_softmax", "norm", "topk", "sort", "cumsum")


@dataclass(frozen=True)
class Findings:
    """What a rehearsal saw.

    Attributes:
        partial: parameters that no style covers and that meet sharded activations, so that each rank has a part of
            their gradients.
        modified: modules with a style whose output the model modifies in place.
        ran: modules with a style that ran at all.
    """

    partial: frozenset[str]
    modified: frozenset[str]
    ran: frozenset[str]


def rehearse(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> Findings:
    """What a plan lacks to be right. No device, no collective, no real weight.

    Args:
        model: a transformers model whose forward takes ids `(B, S)`.
        plan: concrete, without `*`: from `expand_plan`.
        ranks: size of the axis.

    Raises:
        ValueError: the plan would give wrong results, and where.
    """
    watch, whole = _run(model, plan, ranks), _run(model, plan, 1)
    for (had, has), (had_whole, has_whole) in zip(watch.reshaped, whole.reshaped, strict=False):
        if has != has_whole and (had, had_whole) != (has, has_whole):
            raise ValueError(
                f"the plan does not fit {type(model).__name__}: on one rank's share it would cut heads of {has_whole} "
                f"features into {has}"
            )
    covered = {name for name, style in plan.items() if not isinstance(style, LocalShards)}
    partial = {name for name in watch.partial if not any(name.startswith(f"{owner}.") for owner in covered)}
    return Findings(frozenset(partial), frozenset(watch.modified), frozenset(watch.ran))


def _run(model: nn.Module, plan: dict[str, ParallelStyle], ranks: int) -> _Watch:
    twin = _weightless(model)
    watch = _Watch(dict(twin.named_parameters()))
    for name, module in list(twin.named_modules()):
        style = plan.get(name)
        if isinstance(style, (ColwiseParallel, RowwiseParallel)):
            watch.sharded |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
        if isinstance(style, RowwiseParallel) and isinstance(module, nn.Embedding):
            _looked_up(watch, name, module)
        elif isinstance(style, ColwiseParallel):
            _colwise(watch, name, module, style, ranks)
        elif isinstance(style, RowwiseParallel) and isinstance(module, nn.Linear):
            _rowwise(watch, name, module, style, ranks)
        elif isinstance(style, ExpertsOverTensorAxis):
            _whole(watch, name, module)
        elif isinstance(style, LocalShards):
            _local(watch, name, module, style, ranks)
        elif isinstance(style, ReplicatedWithGradAllReduce):
            watch.summed |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        elif isinstance(style, MlaKvAProjection):
            _summed_in_backward(watch, module)
        elif style is None and _routes(module):
            _whole(watch, name, module)
        elif style is None and type(module) is nn.Linear:
            _plain(watch, module)
    settings = {"use_cache": False} if "use_cache" in inspect.signature(twin.forward).parameters else {}
    try:
        with torch.no_grad(), watch:
            ids = torch.ones(2, 8, dtype=torch.int64)
            watch.active[ids] = True
            output = twin(ids, **settings)
    except (_WrongError, ReadDirectlyError) as why:
        raise ValueError(f"the plan does not fit {type(model).__name__}: {why}") from why
    except Exception as error:  # whatever the model's own code raises on a rank's share
        raise ValueError(
            f"the plan does not fit {type(model).__name__}: on one rank's share its forward fails with "
            f"{type(error).__name__}: {error}"
        ) from error
    for tensor in _tensors(output):
        if watch.is_sharded(tensor):
            raise ValueError(f"the plan does not fit {type(model).__name__}: its output would be one rank's share")
    return watch


class ReadDirectlyError(Exception):
    """A parameter that a style shards is read by code outside its own module."""

    def __init__(self, parameter: str) -> None:
        super().__init__(f"{parameter} is read outside its own module, so it cannot be sharded")
        self.parameter = parameter


class _WrongError(Exception):
    pass


class _Watch(TorchDispatchMode):
    """Which tensors hold a rank's share, and which parameters were computed with them.

    A tensor's mark is the size of its last dim while that is the sharded one, 0 after it took another shape.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.parameters = parameters  # held, so that no other tensor gets the identity of one
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.trained: Any = WeakIdKeyDictionary()  # tensors that a gradient goes through
        self.ran: set[str] = set()  # modules with a style that ran
        self.modified: set[str] = set()  # modules with a style whose output is modified in place
        self.outputs: Any = WeakIdKeyDictionary()
        self.reshaped: list[tuple[int, int]] = []  # last dims of sharded features before and after a change of shape
        self.marks: Any = WeakIdKeyDictionary()
        self.sources: Any = WeakIdKeyDictionary()  # a tensor made of parameters and constants -> the parameters' names
        self.active: Any = WeakIdKeyDictionary()  # tensors that depend on the batch
        self.summed: set[str] = set()  # parameters whose gradients a style sums
        self.sharded: set[str] = set()  # parameters that a style shards: only their own module may read them
        self.partial: set[str] = set()

    def is_sharded(self, tensor: torch.Tensor) -> bool:
        return tensor in self.marks

    def mark(self, tensor: torch.Tensor) -> torch.Tensor:
        self.marks[tensor] = tensor.shape[-1]
        return self.activate(tensor)

    def activate(self, tensor: torch.Tensor, name: str = "") -> torch.Tensor:
        self.active[tensor] = True
        self.trained[tensor] = True
        if name:
            self.outputs[tensor] = name
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func._schema.is_mutable and args and id(args[0]) in self.names:
            return args[0]  # a model that rescales its own weights; here they share one number
        function, output = func, func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs or {})))
        names = set().union(*(self._sources(tensor) for tensor in inputs)) if inputs else set()
        if read := sorted(names & self.sharded):
            raise ReadDirectlyError(read[0])
        marked = [tensor for tensor in inputs if tensor in self.marks]
        if function._schema.is_mutable and inputs and inputs[0] in self.outputs:
            self.modified.add(self.outputs[inputs[0]])
        if marked:
            self.partial |= names
            self._refuse_reduction(function, args, marked[0])
            self._refuse_taking_apart(function, args, marked[0])
            if whole := [t for t in inputs if t not in self.marks and t in self.trained and t.is_floating_point()]:
                raise _WrongError(
                    f"it computes {function._schema.name.removeprefix('aten::')} of one rank's share and a whole "
                    f"activation of shape {tuple(whole[0].shape)}, whose gradient would be a part of a sum"
                )
        if marked and self.marks[marked[0]] and function._schema.name.removeprefix("aten::") in _RESHAPES:
            self.reshaped.append((marked[0].shape[-1], output.shape[-1]))
        trained = bool(names - self.summed) or any(tensor in self.trained for tensor in inputs)
        widths = {self.marks[tensor] for tensor in marked}
        depends = marked or any(tensor in self.active for tensor in inputs)
        for tensor in _tensors(output):
            if marked:
                kept = tensor.dim() > 0 and tensor.shape[-1] in widths and _keeps_places(function)
                self.marks[tensor] = tensor.shape[-1] if kept else 0
            if depends:
                self.active[tensor] = True
                if trained and tensor.is_floating_point():
                    self.trained[tensor] = True
            elif names:
                self.sources[tensor] = names
        return output

    def _refuse_taking_apart(self, function: Any, args: tuple, tensor: torch.Tensor) -> None:
        """A rank's share of fused features is not the same share of each of them."""
        name = function._schema.name.removeprefix("aten::")
        if name not in _TAKES_APART or not self.marks[tensor] or args[0] is not tensor:
            return
        dim = args[_TAKES_APART[name]] if len(args) > _TAKES_APART[name] else 0
        if dim % tensor.dim() == tensor.dim() - 1 and not (name == "slice" and _takes_all(args, tensor)):
            raise _WrongError(f"it takes apart ({name}) features of which each rank has a share {tuple(tensor.shape)}")

    def _sources(self, tensor: torch.Tensor) -> set[str]:
        return {self.names[id(tensor)]} if id(tensor) in self.names else self.sources.get(tensor, set())

    def _refuse_reduction(self, function: Any, args: tuple, tensor: torch.Tensor) -> None:
        name = function._schema.name.removeprefix("aten::")
        if name not in _REDUCTIONS or not self.marks[tensor] or args[0] is not tensor:
            return
        dims = args[1] if len(args) > 1 else None
        dims = [dims] if isinstance(dims, int) else dims
        if (
            dims is None
            or not isinstance(dims, (list, tuple))
            or any(d % tensor.dim() == tensor.dim() - 1 for d in dims)
        ):
            raise _WrongError(
                f"it takes the {name} over features of which each rank has a share ({tuple(tensor.shape)})"
            )


_RESHAPES = ("view", "reshape", "_unsafe_view")
# The position of the dim among the arguments of operators that split a tensor.
_TAKES_APART = {"split": 2, "split_with_sizes": 2, "chunk": 2, "slice": 1, "select": 1, "unbind": 1}


def _takes_all(args: tuple, tensor: torch.Tensor) -> bool:
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    end = args[3] if len(args) > 3 and args[3] is not None else tensor.shape[-1]
    return start == 0 and end >= tensor.shape[-1] and (len(args) < 5 or args[4] == 1)


def _keeps_places(function: Any) -> bool:
    """Whether an operator may leave the last dim as it is: anything but a change of shape or a matrix product."""
    name = function._schema.name.removeprefix("aten::")
    return name not in (
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "mm",
        "bmm",
        "addmm",
        "unflatten",
    )


def _colwise(watch: _Watch, name: str, module: Any, style: ColwiseParallel, ranks: int) -> None:
    gathered = style.output_layouts[0] == Replicate()

    def share(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        watch.ran.add(name)
        if watch.is_sharded(hidden):
            raise _WrongError(f"{name} wants all features, but gets one rank's share")
        if isinstance(module, nn.Embedding):
            return watch.activate(torch.ones(*hidden.shape, module.embedding_dim))
        width = module.out_features if gathered else module.out_features // ranks
        output = torch.ones(*hidden.shape[:-1], width, dtype=hidden.dtype)
        return watch.activate(output) if gathered else watch.mark(output)

    module.forward = share


def _rowwise(watch: _Watch, name: str, module: Any, style: RowwiseParallel, ranks: int) -> None:
    splits = style.input_layouts[0] == Replicate()

    def summed(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        watch.ran.add(name)
        wanted = module.in_features if splits else module.in_features // ranks
        if splits == watch.is_sharded(hidden) or hidden.shape[-1] != wanted:
            has = "one rank's share" if watch.is_sharded(hidden) else "all features"
            raise _WrongError(f"{name} gets {has} in {hidden.shape[-1]} columns, but wants {wanted}")
        return watch.activate(torch.ones(*hidden.shape[:-1], module.out_features, dtype=hidden.dtype), name)

    module.forward = summed


def _looked_up(watch: _Watch, name: str, module: Any) -> None:
    def rows(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        watch.ran.add(name)
        return watch.activate(torch.ones(*ids.shape, module.embedding_dim), name)

    module.forward = rows


def _whole(watch: _Watch, name: str, module: nn.Module) -> None:
    """A module of experts: what it takes and returns is whole; what it does depends on values, so it is not run."""

    def same(*args: Any, **kwargs: Any) -> Any:
        tensors = list(_tensors((args, kwargs)))
        if any(watch.is_sharded(t) for t in tensors):
            raise _WrongError(f"{name} wants all features, but gets one rank's share")
        return tensors[0] * 1

    module.forward = same


def _local(watch: _Watch, name: str, module: Any, style: LocalShards, ranks: int) -> None:
    for leaf, placement in style.layouts.items():
        parameter = module._parameters.get(leaf)
        if parameter is None:
            continue
        dim = placement.dim % parameter.dim()
        local = nn.Parameter(parameter.narrow(dim, 0, parameter.shape[dim] // ranks).clone(), requires_grad=False)
        module.register_parameter(leaf, local)
    if style.sum_output:
        _whole(watch, name, module)


def _plain(watch: _Watch, module: Any) -> None:
    """A linear without a style computes nothing either, unless a rank's share reaches it."""
    forward = module.forward

    def whole(hidden: torch.Tensor) -> torch.Tensor:
        if watch.is_sharded(hidden):
            return forward(hidden)
        return watch.activate(torch.ones(*hidden.shape[:-1], module.out_features, dtype=hidden.dtype))

    module.forward = whole


def _summed_in_backward(watch: _Watch, module: Any) -> None:
    def whole(hidden: torch.Tensor) -> torch.Tensor:
        output = torch.ones(*hidden.shape[:-1], module.out_features, dtype=hidden.dtype)
        watch.active[output] = True  # but not trained: the style takes care of its gradient
        return output

    module.forward = whole


def _routes(module: Any) -> bool:
    """Stacked experts, whose own forward loops over the experts that were chosen."""
    experts = getattr(module, "num_experts", None)
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] == experts]
    return isinstance(experts, int) and bool(stacked)


def _weightless(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters share one number each."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.ones(()).expand(parameter.shape), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.ones_like(buffer, device="cpu") if buffer.is_meta else buffer.to("cpu", copy=True)
        if buffer.dtype == torch.float64:
            memo[id(buffer)] = memo[id(buffer)].float()
    for module in model.modules():
        if "config" in vars(module):
            memo[id(module.config)] = module.config
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                memo.setdefault(id(value), value.detach())
    return copy.deepcopy(model, memo).eval()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
