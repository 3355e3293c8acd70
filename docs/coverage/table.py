"""Write pipeline.md from what `nox -s sweep` measured: one row for every causal language model of transformers."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import torch
import transformers

HERE = pathlib.Path(__file__).parent
SWEEP_TEST = HERE.parents[1] / "packages" / "am-pipeline" / "tests" / "test_sweep.py"


def main(folder: str) -> None:
    spec = importlib.util.spec_from_file_location("test_sweep", SWEEP_TEST)
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    measured = {path.stem: json.loads(path.read_text()) for path in pathlib.Path(folder).glob("*.json")}
    exact = [m for m in measured.values() if "errors" in m]
    refused = [m for m in measured.values() if "refused" in m]
    types = sweep.model_types()
    lines = [
        "# Pipelining: every causal language model of transformers",
        "",
        f"`nox -s sweep`, torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}:",
        f"of {len(types)} model types, **{len(exact)} train exactly** on two and on four stages, {len(refused)} are",
        f"refused before anything is sent, {len(sweep.NOT_BUILT)} are not decoders of text by themselves or need more.",
        "",
        "Each is a four-layer model of the type with sizes derived from its config class, cut and run over two",
        "processes: two stages under 1F1B, four under Interleaved1F1B, four sequences in two microbatches. The numbers",
        "are the largest relative differences from one process among the logits and all gradients, in float64, or in",
        "float32 where the model's own code mixes the two. *Travels* names the modules whose outputs go along with the",
        "hidden state because later layers take them; *ids* says that later stages get the ids.",
        "",
        "| model type | class | 2 stages | 4 stages | | travels |",
        "|---|---|---|---|---|---|",
    ]
    for name in types:
        lines.append(row(name, measured.get(name), sweep.NOT_BUILT.get(name)))
    (HERE / "pipeline.md").write_text("\n".join(lines) + "\n")
    print(f"{len(exact)} exact, {len(refused)} refused, {len(sweep.NOT_BUILT)} not built, of {len(types)}")


def row(name: str, result: dict | None, not_built: str | None) -> str:
    if not_built:
        return f"| {name} | | | | not built: {not_built} | |"
    if result is None:
        return f"| {name} | | | | **failed** | |"
    if "refused" in result:
        return f"| {name} | | refused | refused | {result['refused'].splitlines()[0]} | |"
    travels = ", ".join(f"`{n}`" for n in result["traveling"]) + (" ids" if result["needs_ids"] else "")
    two, four = (f"{result['errors'][n]:.0e}" for n in ("2", "4"))
    return f"| {name} | {result['kind']} | {two} | {four} | {result['dtype']} | {travels} |"


if __name__ == "__main__":
    main(sys.argv[1])
