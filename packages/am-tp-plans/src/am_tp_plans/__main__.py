"""`python -m am_tp_plans explain MODEL --tp N`: a plan as a table, before anything is sharded."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from torch import nn

from am_tp_plans.explain import PlanReport, explain_plan
from am_tp_plans.sources.infer import infer_plan
from am_tp_plans.sources.resolve import resolve_plan
from am_tp_plans.sources.sequence import add_sequence_parallelism


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m am_tp_plans", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser("explain", help="which module gets which style, and what it costs")
    explain.add_argument("model", help="a folder with a config.json, or a model type of transformers such as llama")
    explain.add_argument("--tp", type=int, required=True, help="ranks of the tensor-parallel axis")
    explain.add_argument("--sp", action="store_true", help="with sequence parallelism")
    explain.add_argument("--infer", action="store_true", help="a plan from the model's structure, if it has none")
    explain.add_argument("--batch", type=int, default=1)
    explain.add_argument("--seq-len", type=int, default=2048)
    options = parser.parse_args(arguments)
    try:
        print(_explain(options))
    except (ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _explain(options: argparse.Namespace) -> PlanReport:
    model = _model_on_meta(options.model)
    if options.infer:
        plan = infer_plan(model, options.tp)
        plan = add_sequence_parallelism(model, plan) if options.sp else plan
    else:
        plan = resolve_plan(model, sequence_parallel=options.sp)
    return explain_plan(model, plan, options.tp, batch=options.batch, seq_len=options.seq_len)


def _model_on_meta(name: str) -> nn.Module:
    """A transformers causal LM on the meta device, from a folder with its config or a model type."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("explaining a model by its config needs transformers: pip install transformers") from error
    kinds = transformers.CONFIG_MAPPING
    try:
        config = (
            kinds[name]() if name in kinds else transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"{name!r} is neither a folder with a config.json nor a model type of transformers") from error
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise ValueError(f"the config of {name!r} is refused by transformers: {error}") from error
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # whatever a model's own code meets in such a config
        raise ValueError(f"the config of {name!r} makes no model: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
