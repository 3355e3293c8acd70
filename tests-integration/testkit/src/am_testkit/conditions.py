"""The conditions that training runs under: one table of axes, what is legal in it, a few cases that stand for all.

A case is a dict of one condition by axis and one degree by axis of `compositions`: what is trained how, and over which
ranks. The first value of each axis is the plainest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from am_testkit import compositions
from am_testkit.pairwise import Case, covering

AXES: dict[str, tuple[str, ...]] = {
    "attention": ("sdpa", "eager", "flex"),
    "numbers": (
        "float64",
        "float32",
        "bfloat16 by mp_policy",
        "float32 under autocast to bfloat16",
        "bfloat16 with norm and head in float32",
    ),
    "calls": (
        "one step",
        "three steps",
        "eval between",
        "another length",
        "forward before clipping",
        "forward before the optimizer",
        "forward before freezing",
        "error survived",
    ),
    "labels": ("all", "uneven", "none in a microbatch", "none on a rank"),
    "batch": (
        "ids",
        "right padding",
        "left padding",
        "packed",
        "positions of one row",
        "mask of four dims",
        "as long as wide",
    ),
    "head": ("next token", "sequence", "token", "question", "masked", "none", "inner states", "last logits"),
    "trained": ("all", "embedding frozen", "adapters", "frozen at first", "groups by name"),
    "dropout": ("none", "everywhere"),
    "weights": ("untied", "tied", "other seeds"),
    "copies": ("none", "deep copy"),
    "recompute": ("none", "layers", "every second layer", "mlp", "selective"),
    "compile": ("none", "layers"),
}
LAYOUTS = compositions.AXES
PLAIN: Case = {axis: values[0] for axis, values in (AXES | LAYOUTS).items()}
# Sequences of a step over all ranks, and the tokens of each.
SEQUENCES, TOKENS = 8, 16


def cross(
    axes: Mapping[str, Collection] | None = None, *, least: int = 1, most: int = 8, device: str = "cpu"
) -> list[Case]:
    """Cases in which every legal pair of values occurs: of two conditions, or of a condition and a degree.

    Args:
        axes: the values of some axes; the others stay plain. None for all.
        least, most: ranks of the smallest and of the largest layout.
        device: where the cases will run.
    """
    asked = LAYOUTS | AXES if axes is None else axes
    # Degrees first: what they forbid is known before anything else is tried.
    chosen = {axis: tuple(asked.get(axis, (PLAIN[axis],))) for axis in LAYOUTS | AXES}
    return covering(chosen, lambda case: why_not(case, least=least, most=most, device=device), compositions.cost)


def name(case: Case) -> str:
    """The conditions that are not plain, and the layout; `plain` where all are."""
    special = [f"{axis}_{case[axis]}".replace(" ", "_") for axis in AXES if case[axis] != PLAIN[axis]]
    return "-".join([*(special or ["plain"]), compositions.name(case)])


def data_ranks(case: Case) -> int:
    """How many parts a batch is cut into."""
    return case["dp_replicate"] * case["dp_shard"]


def microbatch(case: Case) -> int:
    """Sequences per microbatch: at least two microbatches, as two stages need."""
    return min(2, SEQUENCES // data_ranks(case) // 2)


def length(case: Case) -> int:
    """Tokens per sequence."""
    return SEQUENCES // data_ranks(case) if case["batch"] == "as long as wide" else TOKENS


def must_be_refused(case: Case) -> bool:
    """Whether the right answer is an error on every rank."""
    return case["weights"] == "other seeds"


def why_not(case: Case, *, compared: bool = True, least: int = 1, most: int = 8, device: str = "cpu") -> str | None:
    """What makes a case illegal; None if it is legal, or if it lacks axes that could make it so.

    Args:
        case: conditions and degrees by axis.
        compared: with one process, number by number.
        least, most: ranks of the smallest and of the largest layout.
        device: where it will run.
    """
    if set(LAYOUTS) <= set(case):
        if not least <= compositions.ranks(case) <= most:
            return f"not between {least} and {most} ranks"
        if reason := compositions.why_not(case, experts=case["ep"] > 1):
            return reason
    if compared and case.get("dropout", "none") != "none":
        return "one process draws other masks: dropout is shown by its properties"
    if device == "cpu" and case.get("attention") == "flex":
        return "flex attention has no backward on a CPU"
    for axes, broken, reason in _RULES:
        if set(axes) <= set(case) and broken(*(case[axis] for axis in axes)):
            return reason
    return None


_BFLOAT16 = AXES["numbers"][2:]
_WITH_HEAD = ("next token", "sequence", "token", "last logits")
# Axes, what is illegal among their values, and why.
_RULES: tuple[tuple[tuple[str, ...], Callable[..., bool], str], ...] = (
    (("attention", "numbers"), lambda a, n: a == "flex" and n == "float64", "flex attention has no float64"),
    (("attention", "batch"), lambda a, b: a == "flex" and b == "mask of four dims", "flex attention has block masks"),
    (
        ("numbers", "head"),
        lambda n, h: n == _BFLOAT16[2] and h not in _WITH_HEAD,
        "the model has no final norm and linear head to keep in float32",
    ),
    (
        ("numbers", "weights"),
        lambda n, w: n == _BFLOAT16[2] and w != "untied",
        "a float32 head that is tied makes the embedding float32",
    ),
    (
        ("weights", "head"),
        lambda w, h: w != "untied" and h not in ("next token", "masked", "last logits"),
        "nothing is tied without a head over the vocabulary",
    ),
    (
        ("weights", "pp", "dp_replicate", "dp_shard"),
        lambda w, *degrees: w == "other seeds" and max(degrees) == 1,
        "no two ranks hold the same weights",
    ),
    (
        ("weights", "tp", "cp", "ep"),
        lambda w, *degrees: w == "other seeds" and degrees != (1, 1, 1),
        "tensor, context and expert ranks take the weights of their first",
    ),
    (
        ("labels", "dp_replicate", "dp_shard"),
        lambda labels, *degrees: labels == "none on a rank" and max(degrees) == 1,
        "one data rank has all labels",
    ),
    (
        ("batch", "dp_replicate", "dp_shard", "cp", "tp"),
        lambda b, r, s, cp, tp: b == "as long as wide" and SEQUENCES // r // s % (2 * cp if cp > 1 else 1) > 0,
        "the sequence does not divide over the context ranks",
    ),
    (
        ("batch", "cp"),
        lambda b, cp: b == "mask of four dims" and cp > 1,
        "context ranks take a mask of tokens, not of pairs",
    ),
    (("batch", "head"), lambda b, h: b == "packed" and h in ("sequence", "question"), "a row has several documents"),
    (
        ("head", "cp"),
        lambda h, cp: h in ("sequence", "question", "last logits") and cp > 1,
        "the head looks at the whole sequence",
    ),
    (("head", "pp"), lambda h, pp: h == "inner states" and pp > 1, "a pipeline returns what its last stage returns"),
    (
        ("head", "tp"),
        lambda h, tp: h == "inner states" and tp == "2 sp",
        "hidden states between layers are parts of the sequence",
    ),
    (("head", "ep"), lambda h, ep: h == "masked" and ep > 1, "the model has no experts"),
    (
        ("trained", "calls"),
        lambda t, c: t == "frozen at first" and c == "forward before freezing",
        "what is frozen already is not frozen later",
    ),
    (
        ("copies", "dp_replicate", "dp_shard", "cp", "tp", "ep"),
        lambda c, *degrees: c == "deep copy" and degrees != (1, 1, 1, 1, 1),
        "modules of FSDP2 cannot be copied",
    ),
    (("copies", "numbers"), lambda c, n: c == "deep copy" and n == _BFLOAT16[0], "modules of FSDP2 cannot be copied"),
    (
        ("recompute", "trained"),
        lambda r, t: r in ("mlp", "selective") and t == "adapters",
        "adapters are in what would be recomputed apart",
    ),
    (
        ("recompute", "cp", "ep"),
        lambda r, cp, ep: r not in ("none", "layers") and max(cp, ep) > 1,
        "beside context and expert ranks whole layers are recomputed",
    ),
)
