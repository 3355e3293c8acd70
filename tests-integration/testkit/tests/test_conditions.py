"""The table of conditions: every legal pair of values appears, every batch is what it says, every program runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from am_testkit import compositions, conditions
from am_testkit.batches import IGNORED, PADDING, build_batch
from am_testkit.conditioned import build_model, sum_of_losses
from am_testkit.exact import relative_error
from am_testkit.pairwise import pairs
from am_testkit.programs import PROGRAMS, OneProcess, program

EVERY = conditions.cross()
PLAIN = conditions.PLAIN
ILLEGAL_ON_CPU = {("attention", "flex"), ("dropout", "everywhere")}


def test_every_case_is_legal_and_small_enough():
    assert [case for case in EVERY if conditions.why_not(case)] == []
    assert max(map(compositions.ranks, EVERY)) <= 8
    assert len(EVERY) < 100
    assert len({conditions.name(case) for case in EVERY}) == len(EVERY)


def test_every_value_appears():
    axes = conditions.LAYOUTS | conditions.AXES
    found = set().union(*(case.items() for case in EVERY))
    assert {(axis, value) for axis, values in axes.items() for value in values} - found == ILLEGAL_ON_CPU


@given(st.data())
def test_every_legal_pair_of_values_appears(data):
    axes = conditions.LAYOUTS | conditions.AXES
    case = {axis: data.draw(st.sampled_from(values)) for axis, values in axes.items()}
    covered = set().union(*map(pairs, EVERY))
    if conditions.why_not(case) is None:
        assert pairs(case) <= covered
    for pair in pairs(case):
        legal_beside_plain = conditions.why_not(PLAIN | dict(pair)) is None
        assert not legal_beside_plain or pair in covered


@given(st.data())
def test_a_case_that_lacks_axes_is_never_refused_for_what_they_could_mend(data):
    axes = conditions.LAYOUTS | conditions.AXES
    case = {axis: data.draw(st.sampled_from(values)) for axis, values in axes.items()}
    part = {axis: case[axis] for axis in data.draw(st.sets(st.sampled_from(list(axes))))}
    if conditions.why_not(case) is None:
        assert conditions.why_not(part) is None


def test_what_is_illegal_says_why():
    flex = PLAIN | {"attention": "flex"}
    assert conditions.why_not(flex) == "flex attention has no backward on a CPU"
    assert conditions.why_not(flex, device="cuda") == "flex attention has no float64"
    assert conditions.why_not(flex | {"numbers": "float32"}, device="cuda") is None
    dropout = PLAIN | {"dropout": "everywhere"}
    assert "shown by its properties" in conditions.why_not(dropout)
    assert conditions.why_not(dropout, compared=False) is None


def test_a_choice_of_axes_leaves_the_others_plain():
    chosen = conditions.cross({"attention": ("sdpa", "eager"), "pp": (1, 2)}, least=2)
    assert len(chosen) == 2
    assert {case["attention"] for case in chosen} == {"sdpa", "eager"}
    assert all(case["pp"] == 2 and case["batch"] == "ids" for case in chosen)


@pytest.mark.parametrize("case", EVERY, ids=conditions.name)
def test_a_batch_is_what_its_condition_says(case):
    batch = build_batch(case, seed=1)
    length = conditions.length(case)
    assert batch.ids.shape == (conditions.SEQUENCES, length)
    assert batch.labelled() > 0
    mask, positions = batch.inputs.get("attention_mask"), batch.inputs.get("position_ids")
    kind = case["batch"]
    if kind.endswith("padding"):
        assert mask.equal((batch.ids != PADDING).long())
        assert mask.min() == 0
        assert (mask[:, 0 if kind == "right padding" else -1] == 1).all()
    elif kind == "packed":
        assert ((positions == 0).sum(1) == 2).all()
    elif kind in ("positions of one row", "as long as wide"):
        assert positions.shape == (1, length)
        assert kind != "as long as wide" or length == conditions.SEQUENCES // conditions.data_ranks(case)
    elif kind == "mask of four dims":
        assert mask.shape == (conditions.SEQUENCES, 1, length, length)
    counted = (batch.labels != IGNORED).flatten(1) if batch.labels.dim() > 1 else (batch.labels != IGNORED)[:, None]
    per_row = counted.sum(1)
    if case["labels"] == "uneven":
        assert len(set(per_row.tolist())) > 1
    elif case["labels"] == "none in a microbatch":
        assert per_row[: conditions.microbatch(case)].sum() == 0
    elif case["labels"] == "none on a rank":
        assert batch.rows(slice(-(conditions.SEQUENCES // conditions.data_ranks(case)), None)).labelled() == 0


@pytest.mark.parametrize("head", conditions.AXES["head"])
@pytest.mark.parametrize("numbers", conditions.AXES["numbers"])
def test_every_head_trains_in_every_legal_kind_of_numbers(head, numbers):
    case = PLAIN | {"head": head, "numbers": numbers, "batch": "right padding", "labels": "uneven"}
    if conditions.why_not(case):
        pytest.skip(conditions.why_not(case))
    one = OneProcess(case, build_model(case))
    said = [one.say(word) for word in program(case)]
    losses = [loss.item() for loss in said if loss is not None]
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("calls", PROGRAMS)
@pytest.mark.parametrize("trained", conditions.AXES["trained"])
def test_every_program_trains_what_it_says(calls, trained):
    case = PLAIN | {"calls": calls, "trained": trained}
    if conditions.why_not(case):
        pytest.skip(conditions.why_not(case))
    one = OneProcess(case, build_model(case))
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    for word in program(case):
        one.say(word)
    moved = {name for name, p in one.model.named_parameters() if not p.equal(before[name])}
    if trained == "adapters":
        assert moved == {name for name in before if "lora" in name}
    elif trained == "embedding frozen":
        assert moved == set(before) - {"model.embed_tokens.weight"}
    else:
        assert moved == set(before)


def test_a_copy_computes_with_weights_of_its_own():
    case = PLAIN | {"copies": "deep copy"}
    one = OneProcess(case, build_model(case))
    assert program(case)[0] == "copy"
    assert one.say("copy").item() == 0
    assert one.say("eval").item() > 0


def test_losses_of_shares_add_up_to_the_mean_over_all_labels():
    for head in ("next token", "sequence", "question", "none"):
        case = PLAIN | {"head": head, "labels": "uneven", "dp_shard": 2}
        batch = build_batch(case, seed=1)
        output = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(0)).double()
        output = {"sequence": output[:, 0], "question": output[..., :2], "none": output}.get(
            head, output.repeat(1, 1, 24)
        )
        whole = sum_of_losses(head, output, batch.labels) / batch.labelled()
        halves = [sum_of_losses(head, output[r], batch.rows(r).labels) for r in (slice(0, 4), slice(4, 8))]
        assert torch.allclose(sum(halves) / batch.labelled(), whole)


def test_every_axis_of_the_table_has_its_plain_value_first():
    assert all(PLAIN[axis] == values[0] for axis, values in conditions.AXES.items())
    assert conditions.why_not(PLAIN) is None
    assert set(PROGRAMS) == set(conditions.AXES["calls"])
    assert all(len(set(values)) == len(values) for values in itertools.chain(conditions.AXES.values()))


def test_a_nan_is_an_infinite_error():
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), nan_is_nan=True) == 0
