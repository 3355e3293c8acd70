"""What all ranks found, and the table of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from verifying.conditions import Condition

PATIENCE = timedelta(seconds=60)  # for ranks that have not come so far
EXACT, WRONG, REFUSED = 0, 1, 2


@dataclass
class Result:
    """Under one condition: the errors by name, or why it was refused; or what broke.

    Attributes:
        speaker: the first rank that came so far, which prints what was found.
    """

    condition: Condition
    errors: dict[str, float] = field(default_factory=dict)
    refused: str = ""
    broke: str = ""
    speaker: int = 0

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    @property
    def code(self) -> int:
        if self.refused and not self.broke:
            return REFUSED
        return WRONG if self.broke or self.worst > self.condition.tolerance else EXACT


def agree(result: Result, number: int, store: dist.Store, rank: int, world_size: int) -> Result:
    """The result of all ranks: the largest errors; refused if every rank refused, broken if some did.

    It goes by the store: ranks that wait for one that was refused cannot be reached by a collective.
    """
    mine = {"errors": result.errors, "refused": result.refused, "broke": result.broke}
    store.set(f"result {number} of {rank}", json.dumps(mine))
    everyone, here = [], []
    for other in range(world_size):
        try:
            store.wait([f"result {number} of {other}"], PATIENCE)
        except dist.DistStoreError:
            continue
        here.append(other)
        everyone.append(json.loads(store.get(f"result {number} of {other}")))
    together = Result(result.condition, speaker=here[0])
    for each in everyone:
        for name, error in each["errors"].items():
            together.errors[name] = max(error, together.errors.get(name, 0.0))
    together.refused = next((each["refused"] for each in everyone if each["refused"]), "")
    together.broke = next((each["broke"] for each in everyone if each["broke"]), "")
    if together.refused and not all(each["refused"] for each in everyone):
        together.broke = f"only some ranks refused: {together.refused}"
    if len(here) < world_size:
        waiting = ", ".join(str(other) for other in range(world_size) if other not in here)
        together.broke = f"rank {waiting} still waits for what did not come: {together.broke or together.refused}"
    return together


def table(results: list[Result], rows: int = 10) -> str:
    """Errors by parameter, the worst first, with a column for each condition; then tolerance and verdict."""
    letters = [f"({chr(ord('a') + index)})" for index in range(len(results))]
    lines = [f"{letter} {result.condition}" for letter, result in zip(letters, results, strict=True)]
    measured = [result for result in results if result.errors]
    if measured:
        badness = {}
        for result in measured:
            for name, error in result.errors.items():
                badness[name] = max(badness.get(name, 0.0), error / result.condition.tolerance)
        names = sorted(badness, key=lambda name: -badness[name])[:rows]
        width = max(map(len, [*names, "largest relative error of"]))
        lines += ["", f"{'largest relative error of':<{width}}" + "".join(f"{letter:>10}" for letter in letters)]
        for name in names:
            lines.append(f"{name:<{width}}" + "".join(_number(r.errors.get(name)) for r in results))
        left = len(badness) - len(names)
        lines += [f"and {left} more that are smaller"] if left else []
        lines.append(f"{'tolerance':<{width}}" + "".join(_number(r.condition.tolerance) for r in results))
    for letter, result in zip(letters, results, strict=True):
        words = {EXACT: "exact", WRONG: "WRONG", REFUSED: "refused"}[result.code]
        why = result.broke or result.refused
        lines.append(f"{letter} {words}{': ' + why if why else f', {result.worst:.1e} at most'}")
    return "\n".join(lines)


def exit_code(results: list[Result]) -> int:
    """1 if anything was wrong, else 2 if anything was refused, else 0."""
    codes = {result.code for result in results}
    return WRONG if WRONG in codes else REFUSED if REFUSED in codes else EXACT


def _number(error: float | None) -> str:
    return f"{'':>10}" if error is None else f"{error:>10.1e}"
