"""Write `reliability.md` and its picture from what `nox -s survival` measured."""

from __future__ import annotations

import json
import pathlib
import re
import sys

import torch
import transformers
from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).parent
VERSIONS = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
IN_A_STEP = "in the middle of a forward, by the rank itself"
AT_A_FILE = "when the rank makes the file durable, in the third checkpoint"
FAULTS = {
    "SIGKILL in the middle of a step": IN_A_STEP,
    "SIGKILL of a rank on one of two nodes": f"{IN_A_STEP}; two launchers, one rank each",
    "SIGKILL while a checkpoint's tensors are written": AT_A_FILE,
    "SIGKILL while a checkpoint's manifest is written": AT_A_FILE,
    "SIGKILL while `latest` is replaced": AT_A_FILE,
    "SIGTERM of the launcher": "while a rank is in the middle of a forward",
    "an exception": f"raised {IN_A_STEP}",
    "SIGSTOP: a rank that stops answering": f"{IN_A_STEP}; `--timeout 60`",
    "a rank that waits for ever": f"{IN_A_STEP}; `--timeout 60`",
    "a full disk: a small tmpfs": "`--out` on a tmpfs of two and a half checkpoints",
    "a full disk: a limit on the size of files": "`RLIMIT_FSIZE` of 100 kB on one rank",
    "a checkpoint file: truncated": "the largest file of the last checkpoint cut in half",
    "a checkpoint file: one byte changed": "in the middle of the largest file of the last checkpoint",
    "a checkpoint file: no manifest": "`manifest.json` of the last checkpoint removed",
    "every checkpoint: truncated": "the largest file of both cut in half",
    "a value that is not a number, once": "one activation of one rank becomes NaN, then a restart",
    "gradients that are NaN": "one activation of one rank becomes NaN, no restarts",
    "other arguments, another seed, another text on one rank": "two launchers with a command line and a file each",
}


PAGE = """# What the main job survives

`docs/examples/train.py` under `torchrun`, with faults in real runs of a small model: eight steps, a checkpoint every
two. A run that failed is started again by `torchrun --max-restarts`, or by hand with `--resume` where the table says
so, and continues from the last complete checkpoint. *Bit-identical*: `losses.txt` then equals, in every digit of every
step, that of a run to which nothing happened.

- **One cause, told by every rank.** A rank that fails, or has not moved for `--timeout` seconds, calls the roll through
  the launcher's store. A thread of each rank answers, also of one that waits in a collective; who does not answer is
  named, with the step it was last seen in. Then all end, so that the launcher can start them again.
- **Whole checkpoints.** A checkpoint is complete when its manifest is there, with size and SHA-256 of each file: it is
  written last. Then `latest` names it, and only then the oldest is removed; two complete ones are kept, and what they
  rely on is fsynced. A damaged one is passed over, in so many words, for the one before.
- **The same start everywhere.** Arguments, model and text of all ranks are compared before there is a process group.
- **SIGTERM** ends the run after the step, with a checkpoint. torchrun kills what has not ended after 30 seconds, or
  `--shutdown-timeout`: give it the time of a step and a checkpoint.
- A start without `--resume` moves what an earlier run left in `--out` to `before`. The same run, started again by its
  launcher, continues.

`nox -s survival`, {versions}, gloo on two cores that had other work too. Which rank fails in which step is drawn with a
seed. *Told* is when the cause was printed, in seconds after the fault. *Seconds* go from the fault to the first word of
the restarted ranks (most of it is importing torch and transformers anew), or to the end of the launcher; where a start
is refused or passes a checkpoint over, they are those of the whole run.

| fault | injected | layout | a rank's words | then | told | seconds | losses |
|---|---|---|---|---|---|---|---|
{rows}

## Five hundred steps

Resident memory of each rank after each step, with a checkpoint every 50. The slope is that of a line through steps 101
to 500, in MiB per 100 steps.

| layout | rank | after 100 steps, MiB | after 500 | slope |
|---|---|---|---|---|
{soaks}

![resident memory of each rank over 500 steps](images/soak.png)
"""


def main(folder: str) -> None:
    measured = [json.loads(file.read_text()) for file in sorted(pathlib.Path(folder).glob("*.json"))]
    soaks = [one for one in measured if one["fault"] == "soak"]
    rows = [row(one) for fault in FAULTS for one in measured if one["fault"] == fault]
    draw(soaks)
    lines = [line for one in soaks for line in soak(one)]
    page = PAGE.format(versions=VERSIONS, rows="\n".join(rows), soaks="\n".join(lines))
    (HERE / "reliability.md").write_text(page)
    print(f"{len(rows)} faults, {len(soaks)} soaks")


def row(one: dict) -> str:
    words, end = (without_folders(one[name]).replace("|", "\\|") for name in ("words", "end"))
    losses = "" if one["end"] == "refused" else "bit-identical"
    told = f"{one['told']:.1f}" if "told" in one else ""
    cells = (
        one["fault"],
        FAULTS[one["fault"]],
        one["layout"],
        f"`{words}`",
        end,
        told,
        f"{one['seconds']:.0f}",
        losses,
    )
    return f"| {' | '.join(cells)} |"


def without_folders(text: str) -> str:
    """Names of checkpoints and of files in them, without where the run was."""
    return re.sub(r"(?<!\S)/\S*/(?=step-)|(?<!\S)/\S*/(?=\w)", "", text)


def soak(one: dict) -> list[str]:
    return [
        f"| {one['layout']} | {rank} | {run['MiB'][99]:.1f} | {run['MiB'][499]:.1f} | {run['slope']:+.2f} |"
        for rank, run in enumerate(one["ranks"])
    ]


def draw(soaks: list[dict]) -> None:
    figure = Figure(figsize=(8, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for one, style in zip(soaks, ("-", "--", ":"), strict=False):
        for rank, run in enumerate(one["ranks"]):
            axes.plot(range(1, 501), run["MiB"], style, linewidth=1, label=f"{one['layout']}, rank {rank}")
    axes.set(xlabel="step", ylabel="resident memory, MiB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower center")
    figure.savefig(HERE / "images" / "soak.png")


if __name__ == "__main__":
    main(sys.argv[1])
