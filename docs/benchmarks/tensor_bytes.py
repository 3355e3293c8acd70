"""What a layer sends under tensor and sequence parallelism, from plans alone: no devices, no weights.

    python docs/benchmarks/tensor_bytes.py

The default sizes of each transformers config, bfloat16, one sequence of 4096 tokens, four ranks; bytes are what one
rank sends in a ring for one layer. *each projection* is the same plan with an input of its own for every projection, as
the plans of transformers are written: each sums its input's gradient. `test_explain.py` holds these counts to those of
real ranks.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

from am_tp_plans import (
    SharedInput,
    add_sequence_parallelism,
    explain_plan,
    get_hf_tp_shard_plan,
    infer_plan,
)

MODELS = ("llama", "mistral", "gemma2", "qwen3", "olmo2", "gpt2", "opt")
RANKS, LAYERS, TOKENS = 4, 4, 4096


def main() -> None:
    transformers.logging.set_verbosity_error()
    print("| model | plan | forward, MiB | backward, MiB | hidden state, MiB | parameters per rank |")
    print("|---|---|---|---|---|---|")
    for name in MODELS:
        model = on_meta(name)
        plan = (get_hf_tp_shard_plan if getattr(model, "_tp_plan", None) else infer_plan)(model)
        plans = {
            "each projection": {k: s for k, s in plan.items() if not isinstance(s, SharedInput)},
            "am-tp-plans": plan,
        }
        try:
            plans["with sequence parallelism"] = add_sequence_parallelism(model, plan)
        except ValueError:
            print(f"| {name} | with sequence parallelism | refused | | | |")
        first = None
        for label, each in plans.items():
            report = explain_plan(model, each, RANKS, seq_len=TOKENS)
            forward, backward = (number / 2**20 for number in report.layer_bytes)
            first = first or backward
            print(
                f"| {name} | {label} | {forward:.1f} | {backward:.1f} ({backward / first:.2f}x) "
                f"| {report.hidden_bytes / 2**20:.1f} | {report.held / report.parameters:.0%} |"
            )


def on_meta(name: str) -> nn.Module:
    config = transformers.CONFIG_MAPPING[name](num_hidden_layers=LAYERS)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
