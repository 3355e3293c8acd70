"""The verdict on a test follows from what its ranks did."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from am_testkit.verdict import STATUSES, Outcome, judge

outcomes = st.lists(
    st.builds(Outcome, rank=st.just(0), status=st.sampled_from(STATUSES), text=st.just("whole"), at=st.floats(0, 9)),
    min_size=1,
    max_size=5,
)


@given(outcomes)
def test_only_unanimous_ranks_pass_or_skip(found):
    statuses = {o.status for o in found}
    status = judge(found).status
    if statuses == {"passed"}:
        assert status == "passed"
    elif statuses == {"skipped"}:
        assert status == "skipped"
    else:
        assert status == "failed"


def test_the_rank_that_failed_first_is_shown_whole_and_its_peers_in_a_line():
    text = judge(
        [
            Outcome(0, "killed", "long stack 0", "was at line 3", at=1.0),
            Outcome(1, "failed", "second traceback", "ValueError: second", at=2.0),
            Outcome(2, "failed", "first traceback", "ValueError: first", "printed", at=1.0),
        ]
    ).text
    assert text.startswith("rank 2 of 3 failed:\n\nfirst traceback")
    assert "printed" in text
    assert "rank 0 killed: was at line 3" in text
    assert "rank 1 failed: ValueError: second" in text
    assert "second traceback" not in text
    assert "long stack 0" not in text


def test_a_crash_explains_the_exceptions_of_its_peers():
    text = judge([Outcome(0, "failed", "connection closed", at=1.0), Outcome(1, "crashed", "SIGSEGV", at=1.1)]).text
    assert text.startswith("rank 1 of 2 crashed:\n\nSIGSEGV")


def test_every_rank_that_hung_shows_its_stack():
    text = judge([Outcome(0, "hung", "stack of 0"), Outcome(1, "hung", "stack of 1"), Outcome(2, "passed")]).text
    assert "stack of 0" in text
    assert "stack of 1" in text
    assert "rank 2 passed" in text
