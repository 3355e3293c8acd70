"""Tokens reach their experts and come back, whatever the dispatcher and however uneven the routing."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from am_moe import ExpertParallel, apply_ep
from am_moe.expert_parallel.dispatchers import get_dispatcher
from am_moe.expert_parallel.dispatchers.all_to_all import AllToAll
from am_moe.expert_parallel.ordering import by_expert
from am_testkit.device import device_type
from am_testkit.exact import assert_same, whole

DISPATCHERS = ["all_to_all", "all_gather"]


class Experts(nn.Module):
    """The smallest module that `find_experts` finds: y = sum over chosen e of w_e * (x @ W_e)."""

    def __init__(self, num_experts, width):
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width, width, dtype=torch.float64))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            out = out.index_add(
                0, token, top_k_weights[token, choice, None] * (hidden_states[token] @ self.weight[expert])
            )
        return out


class Counted(TorchDispatchMode):
    """The collectives of the dispatchers, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "am_moe":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def experts_mesh(size=None):
    return init_device_mesh(device_type(), (size or dist.get_world_size(),), mesh_dim_names=("ep",))


def routed(tokens, ids, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, ids.shape[1], dtype=torch.float64, requires_grad=True)
    return hidden, ids, weights


def spread_over(experts, dispatcher="all_to_all"):
    model = nn.ModuleDict({"experts": experts})
    apply_ep(model, experts_mesh(), dispatcher=dispatcher)
    return model["experts"]


CASES = {
    "all tokens choose one expert": lambda rank: torch.zeros(5, 2, dtype=torch.int64),
    "one rank has no tokens": lambda rank: torch.arange(12).reshape(6, 2)[: 6 * rank] % 4,
    "no rank has tokens": lambda rank: torch.zeros(0, 2, dtype=torch.int64),
    "an id occurs twice in a row": lambda rank: torch.tensor([[1, 1], [3, 3], [0, 3]]),
    "some choices mean no expert": lambda rank: torch.tensor([[4, 1], [4, 4], [2, 4]]),
    "no choice means an expert": lambda rank: torch.full((3, 2), 4),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.ranks(2)
def test_uneven_routing_is_exact_in_outputs_and_every_gradient(dispatcher, case):
    uneven_routing(dispatcher, case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(1)
def test_uneven_routing_is_exact_on_one_rank(case):
    uneven_routing("local", case)


def uneven_routing(dispatcher, case):
    torch.manual_seed(0)
    one = Experts(4, 4)
    experts = spread_over(copy.deepcopy(one), dispatcher)
    ranks = dist.get_world_size()
    inputs = [routed(len(CASES[case](r)), CASES[case](r), seed=r) for r in range(ranks)]
    mine = inputs[dist.get_rank()]
    out = experts(*mine)
    out.square().sum().backward()
    for other in inputs:
        hidden, ids, weights = (t.detach().requires_grad_(t.is_floating_point()) for t in other)
        expected = one(hidden, ids, weights)
        expected.square().sum().backward()
        if other is mine:
            assert_same(out, expected, 1e-12, "output")
            assert_same(mine[0].grad, hidden.grad, 1e-12, "gradient of the tokens")
            assert_same(mine[2].grad, weights.grad, 1e-12, "gradient of the routing weights")
    assert_same(experts.weight.grad, one.weight.grad / ranks, 1e-12, "expert gradients")


@pytest.mark.ranks(4)
def test_a_token_travels_once_to_each_rank_that_needs_it():
    experts = spread_over(Experts(8, 4))
    torch.manual_seed(dist.get_rank())
    ids = torch.stack([torch.randperm(8)[:4] for _ in range(16)])
    hidden, ids, weights = routed(16, ids, seed=dist.get_rank())
    rows = sum(len(set(row.tolist())) for row in ids // 2)
    spread = experts.spread_experts
    routes = spread.dispatcher.dispatch(hidden, ids, weights, 2, spread.mesh.get_group()).back
    assert sum(routes.sent) == rows < ids.numel()
    counts = torch.tensor([sum(routes.sent), sum(routes.received)])
    dist.all_reduce(counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("dispatcher", "forward", "backward"),
    [
        ("all_to_all", ["counts_of_all", "all_to_all", "all_to_all"], ["all_to_all"] * 2),
        ("all_gather", ["counts_of_all", "all_gather", "reduce_scatter"], ["all_gather"] + ["reduce_scatter"] * 2),
    ],
)
@pytest.mark.ranks(2)
def test_every_rank_issues_the_same_collectives(dispatcher, forward, backward):
    experts = spread_over(Experts(4, 4), dispatcher)
    ids = torch.zeros(3 * dist.get_rank(), 2, dtype=torch.int64)
    with Counted() as first:
        out = experts(*routed(len(ids), ids, seed=0)).sum()
    with Counted() as second:
        out.backward()
    assert first.names == forward
    assert second.names == backward


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.ranks(2)
def test_the_same_inputs_give_the_same_bits(dispatcher):
    torch.manual_seed(0)
    experts = spread_over(Experts(8, 4), dispatcher)
    ids = torch.stack([torch.randperm(8)[:4] for _ in range(64)])
    results = []
    for _ in range(2):
        inputs = routed(64, ids, seed=dist.get_rank())
        experts.weight.grad = None
        out = experts(*inputs)
        out.square().sum().backward()
        results.append([out, inputs[0].grad, inputs[2].grad, experts.weight.grad.to_local()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.ranks(4)
def test_ranks_with_the_same_tokens_share_the_work():
    torch.manual_seed(0)
    one = Experts(8, 4)
    both = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.ModuleDict({"experts": copy.deepcopy(one)})
    apply_ep(model, experts_mesh(), tp_mesh=both["tp"])
    inputs = [routed(5, torch.stack([torch.randperm(8)[:3] for _ in range(5)]), seed=r) for r in range(2)]
    mine = inputs[both["dp"].get_local_rank()]
    out = model["experts"](*mine)
    out.square().sum().backward()
    for other in inputs:
        hidden, ids, weights = (t.detach().requires_grad_(t.is_floating_point()) for t in other)
        expected = one(hidden, ids, weights)
        expected.square().sum().backward()
        if other is mine:
            assert_same(out, expected, 1e-12, "output")
            assert_same(mine[0].grad, hidden.grad, 1e-12, "gradient of the tokens")
            assert_same(mine[2].grad, weights.grad, 1e-12, "gradient of the routing weights")
    assert_same(model["experts"].weight.grad, one.weight.grad / 2, 1e-12, "an average over the two data ranks")
    with Counted() as comm:
        model["experts"](*mine)
    assert comm.names == ["counts_of_all", "all_to_all", "all_to_all", "all_gather"]


@pytest.mark.ranks(2)
def test_an_object_of_your_own_can_be_the_dispatcher():
    class Recorded(AllToAll):
        rows = 0

        def dispatch(self, *arguments):
            received = super().dispatch(*arguments)
            self.rows += len(received.rows_RD)
            return received

    mine = Recorded()
    torch.manual_seed(0)
    experts = spread_over(Experts(4, 4), mine)
    experts(*routed(3, torch.tensor([[0, 1], [2, 3], [1, 1]]), seed=0))
    assert mine.rows == 2 * (2 if dist.get_rank() == 0 else 1)


@pytest.mark.ranks(2)
def test_the_style_can_be_applied_to_one_module():
    experts = Experts(4, 4)
    before = experts.weight.detach().clone()
    dist.broadcast(before, 0)
    ExpertParallel()._apply(experts, experts_mesh())
    assert_same(whole(experts.weight), before, 0.0)


def test_dispatchers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"'carrier pigeon' is unknown; use one of .*'all_gather'"):
        get_dispatcher("carrier pigeon", 2)
    with pytest.raises(ValueError, match="'local' moves nothing, but the experts are on 2 ranks"):
        get_dispatcher("local", 2)
    with pytest.raises(ValueError, match="DeepEP is not on the package index"):
        get_dispatcher("deepep", 2)
    with pytest.raises(ValueError, match="has no dispatch and combine"):
        get_dispatcher(3, 2)


def test_rows_of_half_precision_are_added_in_float32():
    rows = torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    total = by_expert(torch.zeros(1, 5, dtype=torch.int64), 1, None).rows.sum(rows)
    assert total.dtype is torch.bfloat16
    assert total.item() == 260.0
