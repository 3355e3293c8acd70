"""What a layer of experts asks of the host: syncs and launches, counted."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from am_moe import ExpertLoad, apply_ac, apply_ep
from am_moe.expert_parallel.dispatchers.all_gather import AllGather
from am_moe.expert_parallel.dispatchers.all_to_all import AllToAll
from am_testkit.device import device_type
from am_testkit.models import tiny

# Operators whose result has a size or a value that the host waits for.
_WAITED_FOR = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal", "is_nonzero"}
_ASKED = {"item", "tolist", "cpu", "numpy", "__int__", "__bool__", "__float__", "__index__", "__len__"} - {"__len__"}
# Operators that move or fill all rows once more than has to be.
_WASTE = {"masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_"}
_VIEWS = {"view", "t", "transpose", "slice", "select", "unbind", "detach", "alias", "expand", "_unsafe_view", "split"}
_VIEWS |= {"unsqueeze", "squeeze", "permute", "as_strided", "chunk", "empty", "empty_like", "new_empty"}


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.number = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self):
        return sum(number for name, number in self.number.items() if name not in _VIEWS)

    @property
    def waits(self):
        """The counts that a dispatcher brings to the host are one; the lists that are made of them there are none."""
        return sum(self.number[name] for name in (*_WAITED_FOR, "counts_of_all"))


class Asked(TorchFunctionMode):
    """What Python asks a tensor for, unless the tensor is what `counts_of_all` has brought to the host."""

    def __init__(self):
        super().__init__()
        self.number = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _ASKED:
            self.number[name] += 1
        return func(*args, **(kwargs or {}))


DISPATCHERS = {"local": None, "all_to_all": AllToAll(), "all_gather": AllGather()}


def layer_of_experts(dispatcher, **settings):
    model = tiny("qwen3_moe", layers=1, dtype=torch.float32, **settings)
    apply_ep(model, init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("ep",)))
    experts = model.model.layers[0].mlp.experts
    if DISPATCHERS[dispatcher] is not None:
        experts.spread_experts = dataclasses.replace(experts.spread_experts, dispatcher=DISPATCHERS[dispatcher])
    return model, experts


def inputs(tokens=16):
    torch.manual_seed(dist.get_rank())
    weights, ids = torch.rand(tokens, 8).topk(2)
    return torch.randn(tokens, 32).requires_grad_(), ids, weights.requires_grad_()


@pytest.mark.parametrize(
    ("dispatcher", "waits", "asked"), [("local", 0, 0), ("all_to_all", 1, 2), ("all_gather", 1, 2)]
)
@pytest.mark.ranks(1)
def test_a_layer_waits_for_its_device_as_often_as_it_has_to(dispatcher, waits, asked):
    _, experts = layer_of_experts(dispatcher)
    given = inputs()
    with Operators() as forward, Asked() as python:
        out = experts(*given).square().sum()
    with Operators() as backward:
        out.backward()
    assert (forward.waits, backward.waits) == (waits, 0)
    assert sum(python.number.values()) == asked, "lists of the counts that are on the host"
    assert not _WASTE & set(forward.number + backward.number)


@pytest.mark.parametrize(("dispatcher", "forward", "backward"), [("local", 28, 27), ("all_to_all", 66, 39)])
@pytest.mark.ranks(1)
def test_a_layer_launches_few_operators_whatever_the_number_of_experts(dispatcher, forward, backward):
    launched = []
    for experts in (8, 16):
        _, module = layer_of_experts(dispatcher, num_experts=experts)
        given = inputs()
        with Operators() as first:
            out = module(*given).square().sum()
        with Operators() as second:
            out.backward()
        launched.append((first.launches, second.launches))
    assert launched[0] == launched[1]
    print(launched)
    assert launched[0][0] <= forward
    assert launched[0][1] <= backward


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.ranks(n)) for n in (1, 2, 4)])
def test_operators_do_not_grow_with_the_ranks(ranks):
    _, experts = layer_of_experts("all_to_all")
    given = inputs()
    with Operators() as forward:
        experts(*given)
    assert forward.number["counts_of_all"] == 1
    assert forward.number["all_to_all"] == 2
    assert forward.launches <= 64


@pytest.mark.ranks(1)
def test_recomputation_with_kept_routing_waits_for_nothing():
    model, _ = layer_of_experts("all_to_all")
    apply_ac(model, ignore_router=True)
    ids = torch.randint(3, 90, (2, 8))
    with Operators() as forward:
        loss = model(ids, use_cache=False).logits.square().mean()
    assert forward.waits - forward.number["_local_scalar_dense"] == 1
    with Operators() as backward:
        loss.backward()
    assert backward.waits == 0
    assert backward.number["all_to_all"] == 2, "of gradients"


@pytest.mark.ranks(1)
def test_the_load_of_all_layers_is_asked_for_once():
    model = tiny("qwen3_moe", layers=3, dtype=torch.float32)
    apply_ep(model, init_device_mesh(device_type(), (1,), mesh_dim_names=("ep",)))
    load = ExpertLoad(model)
    experts = [layer.mlp.experts for layer in model.model.layers]
    with Operators() as forward, Asked() as python:
        for module in experts:
            module(*inputs())
    assert forward.waits == 0
    assert not python.number
    with Operators() as metrics, Asked() as python:
        load.metrics()
    assert metrics.waits == 0
    assert python.number == {"tolist": 1}
