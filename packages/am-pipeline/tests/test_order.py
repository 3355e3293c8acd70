"""Orders of actions as plain data: complete, in order, as idle as published; and files that are refused by the cell."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from am_pipeline import Action, bubble_fraction, check_order, peak_live, read_order, schedule_order, simulate

SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


@pytest.mark.parametrize("name", SCHEDULES)
@given(ranks=st.integers(2, 6), rounds=st.integers(2, 4))
def test_every_schedule_is_complete_in_order_and_free_of_deadlock(name, ranks, rounds):
    microbatches = ranks * rounds
    order = schedule_order(name, ranks, microbatches)
    check_order(order, microbatches)
    events = simulate(order)
    assert len(events) == sum(map(len, order))
    for rank in range(ranks):
        mine = [e for e in events if e.rank == rank]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine)), "a rank does one thing at a time"


@given(ranks=st.integers(2, 8), microbatches=st.integers(1, 40))
def test_the_idle_share_of_one_stage_per_rank_is_as_published(ranks, microbatches):
    for name in ("GPipe", "1F1B"):
        idle = bubble_fraction(simulate(schedule_order(name, ranks, microbatches)))
        assert idle == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@given(ranks=st.integers(2, 6), rounds=st.integers(1, 4), stages_per_rank=st.integers(2, 3))
def test_the_idle_share_of_interleaved_stages_is_as_published(ranks, rounds, stages_per_rank):
    microbatches = ranks * rounds
    order = schedule_order("Interleaved1F1B", ranks, microbatches, stages_per_rank)
    idle = bubble_fraction(simulate(order))
    assert idle == pytest.approx((ranks - 1) / (stages_per_rank * microbatches + ranks - 1))


@given(ranks=st.integers(2, 8), rounds=st.integers(2, 4))
def test_zb_v_is_never_idle_when_its_three_passes_cost_the_same(ranks, rounds):
    order = schedule_order("ZBVZeroBubble", ranks, ranks * rounds)
    assert bubble_fraction(simulate(order)) == pytest.approx(0)
    assert bubble_fraction(simulate(order, {"F": 1, "I": 1.5, "W": 0.5})) > 0


def test_1f1b_keeps_fewer_activations_than_gpipe():
    assert peak_live(schedule_order("GPipe", 4, 8)) == [8, 8, 8, 8]
    assert peak_live(schedule_order("1F1B", 4, 8)) == [4, 3, 2, 1]
    assert peak_live(schedule_order("ZBVZeroBubble", 4, 8)) == [8, 8, 8, 8]


def test_a_costlier_stage_makes_the_others_wait():
    order = schedule_order("1F1B", 2, 8)
    assert bubble_fraction(simulate(order, weights=[1.0, 2.0])) > bubble_fraction(simulate(order))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("2F2B", 2, 4), "unknown pipeline schedule '2F2B'"),
        (("1F1B", 0, 4), "must be positive"),
        (("GPipe", 2, 4, 2), "one stage per rank"),
        (("DualPipeV", 2, 2), "at least as many microbatches as stages"),
    ],
)
def test_wrong_schedules_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        schedule_order(*settings)


GOOD = ["0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B1"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (GOOD[:1], "has 1 rows, one per rank, but the pipeline axis has 2"),
        (["0F0,0F1,0X0,0B1", GOOD[1]], "row 1: '0X0' is not an action"),
        (["0F0,0F1,0B0", GOOD[1]], "row 1: 0B1 is missing"),
        (["0F0,0B0,0B1", GOOD[1]], "row 1, cell 3: 0B1 comes before 0F1"),
        (["0F0,0F1,0I0,0B1", GOOD[1]], "row 1: 0W0 is missing"),
        (["0F0,0F1,0W0,0I0,0B1", GOOD[1]], "row 1, cell 3: 0W0 comes before 0I0"),
        (["0F0,0F1,0B0,0I0,0B1", GOOD[1]], "row 1, cell 4: 0I0 computes the gradients of its inputs a second time"),
        (["0F0,0F0,0F1,0B0,0B1", GOOD[1]], "row 1, cell 2: 0F0 was there already, in cell 1"),
        ([GOOD[0], "1F0,1F1,1B0,1B1,0F0"], "row 2: 0F0 runs stage 0, which is on row 1"),
        ([GOOD[0], "2F0,2F1,2B0,2B1"], r"no row runs the stages \[1\] of 3"),
        ([GOOD[0], "1F0,1F1,1B0,1B1,1F2,1B2"], "row 1: 0F2 is missing"),
        (["0F0,0B0,0F1,0B1", "1F0,1F1,1B0,1B1"], r"deadlock: row 1 stops at cell 2, 0B0; row 2 stops at cell 2, 1F1"),
        (["", GOOD[1]], r"no row runs the stages \[0\] of 2"),
    ],
)
def test_a_file_that_would_not_work_is_refused_by_row_and_cell(tmp_path, rows, words):
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=words):
        read_order(str(path), 2)


def test_a_file_may_leave_cells_empty_and_overlap_actions(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("0F0,0F1,,(0B0;0B1)OVERLAP_F_B\n,1F0,1F1,1I0,1W0,1B1\n")
    order = read_order(str(path), 2, 2)
    assert order[0][-1] == Action(0, "B", 1)
    assert order[1][2:4] == [Action(1, "I", 0), Action(1, "W", 0)]
    with pytest.raises(ValueError, match="0F1 is of a microbatch that is not there: the step has 1"):
        read_order(str(path), 2, 1)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        read_order("nowhere.csv", 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0F0,0B0", "9999999F0,9999999B0"], "numbers of at most six digits"),
        (["0F0,0B0", "999999F0,999999B0"], r"no row runs the stages \[1, 2, 3, 4, 5\] and 999993 more of 1000000"),
        (["0F0,0B0", "1F" + "9" * 5000], r"'1F9+\.\.\.' is not an action"),
        (["0F0,0B0", "(" * 20000 + "1F0" + ")OVERLAP_F_B" * 20000], r"'\(+\.\.\.' is not an action"),
        (["0F0,0B0", "((1F0)OVERLAP_F_B)OVERLAP_F_B,1B0"], "is not an action"),
        (["0F0,0B0", "1F0,1B\u0660"], "is not an action"),
    ],
)
def test_absurd_nested_or_overlong_input_is_refused_at_once_in_few_words(tmp_path, rows, words):
    path = tmp_path / "order.csv"
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match=words) as caught:
        read_order(str(path), 2)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("option", ["--ranks", "--microbatches", "--stages-per-rank", "--width"])
def test_the_command_refuses_absurd_sizes(capsys, option):
    from am_pipeline.__main__ import main

    assert main(["timeline", "--schedule", "Interleaved1F1B", option, "1000000000000"]) == 2
    assert "beyond what can be" in capsys.readouterr().err


def test_the_command_refuses_a_config_of_absurd_depth_at_once(tmp_path, capsys):
    pytest.importorskip("transformers")
    from am_pipeline.__main__ import main

    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    assert main(["plan", str(tmp_path)]) == 2
    assert "1000000000 layers are beyond what can be" in capsys.readouterr().err
