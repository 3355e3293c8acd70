"""From what each rank did to what the test did. Pure: no processes, no clock."""

from __future__ import annotations

from dataclasses import dataclass

# In the order in which they explain a failure: a rank that was killed only waited for another.
STATUSES = ("passed", "skipped", "failed", "crashed", "hung", "killed")


@dataclass(frozen=True)
class Outcome:
    """What one rank did.

    Attributes:
        rank: which.
        status: `passed`, `skipped`, `failed` (an exception), `crashed` (the process ended by itself), `hung` (still
            running at the timeout) or `killed` (ended because another rank had failed).
        text: the whole traceback, stack or reason.
        line: the same in one line.
        output: what it printed.
        at: seconds on a clock common to the ranks of a machine; tells who failed first.
    """

    rank: int
    status: str
    text: str = ""
    line: str = ""
    output: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """`status` is `passed`, `skipped` or `failed`; `text` is what a person reads."""

    status: str
    text: str = ""


def judge(outcomes: list[Outcome]) -> Verdict:
    """Passed if every rank passed, skipped if every rank skipped, failed else.

    The rank that failed first is shown whole, every other rank in one line. Where nothing but time ran out, the stack
    of every rank that hung is shown.
    """
    statuses = {o.status for o in outcomes}
    if statuses == {"passed"}:
        return Verdict("passed")
    if statuses == {"skipped"}:
        return Verdict("skipped", outcomes[0].line)
    # Peers of a process that is gone see a closed connection, perhaps before anyone sees that it is gone.
    culprits = [o for o in outcomes if o.status == "crashed"] or [o for o in outcomes if o.status == "failed"]
    culprits.sort(key=lambda o: o.at)
    culprits = culprits[:1] or [o for o in outcomes if o.status == "hung"]
    if not culprits:
        skipped = ", ".join(str(o.rank) for o in outcomes if o.status == "skipped")
        others = ", ".join(f"rank {o.rank} {o.status}" for o in outcomes if o.status != "skipped")
        reason = next((o.line for o in outcomes if o.status == "skipped"), "")
        return Verdict(
            "failed", f"rank {skipped} skipped ({reason}), but {others}: a test skips on every rank or on none"
        )
    parts = []
    for culprit in culprits:
        parts.append(f"rank {culprit.rank} of {len(outcomes)} {culprit.status}:\n\n{culprit.text.rstrip()}")
        if culprit.output.strip():
            parts.append(f"--- what rank {culprit.rank} printed ---\n{culprit.output.rstrip()}")
    shown = {c.rank for c in culprits}
    peers = [f"rank {o.rank} {o.status}{': ' + o.line if o.line else ''}" for o in outcomes if o.rank not in shown]
    return Verdict("failed", "\n\n".join(parts) + ("\n\n" + "\n".join(peers) if peers else ""))
