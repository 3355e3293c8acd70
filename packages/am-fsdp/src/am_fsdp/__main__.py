"""`python -m am_fsdp plan MODEL --dp N --tp M`: memory and traffic of a training step, before there is a cluster."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from typing import Any

import torch
from torch import nn

from am_fsdp.preflight import StepReport, preflight

_RANKS, _TOKENS, _LAYERS = 1 << 20, 1 << 31, 10_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m am_fsdp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="what a training step takes on each rank of a mesh")
    plan.add_argument("model", help="a folder with a config.json, or a model type of transformers such as llama")
    plan.add_argument("--dp", type=int, required=True, help="ranks that parameters are sharded over")
    plan.add_argument("--replicas", type=int, default=1, help="copies of those (HSDP)")
    plan.add_argument("--tp", type=int, default=1, help="ranks of the tensor-parallel axis")
    plan.add_argument("--sp", action="store_true", help="with sequence parallelism")
    plan.add_argument("--checkpointing", default="none", help="none, full, selective, mlp, or n for every n-th layer")
    plan.add_argument("--batch", type=int, default=1, help="sequences on each data rank")
    plan.add_argument("--seq-len", type=int, default=2048)
    plan.add_argument("--dtype", default="float32", help="that parameters are kept in")
    plan.add_argument("--compute-dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place operators nobody uses here
    try:
        print(_plan(options))
    except (ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(options: argparse.Namespace) -> StepReport:
    kept, computed = _dtype("--dtype", options.dtype), _dtype("--compute-dtype", options.compute_dtype)
    config = _config(options.model)
    ranks = options.dp * options.replicas * options.tp
    if ranks > _RANKS or options.batch * options.seq_len > _TOKENS:
        raise ValueError(
            f"{ranks} ranks of {options.batch} x {options.seq_len} tokens are beyond what can be ({_RANKS} ranks, "
            f"{_TOKENS} tokens); look for a slip in the arguments"
        )
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if layers > _LAYERS:
        raise ValueError(f"{layers} layers are beyond what can be ({_LAYERS}); look for a slip in the config")
    mode = options.checkpointing
    mode = False if mode == "none" else int(mode[:9]) if mode.isdecimal() else mode
    axes = {"replicas": options.replicas} if options.replicas > 1 else {}
    axes |= {"data_parallel": options.dp} | ({"tensor_parallel": options.tp} if options.tp > 1 else {})
    return preflight(
        lambda: _model(config, kept),
        axes,
        batch=options.batch,
        seq_len=options.seq_len,
        param_dtype=computed,
        sequence_parallel=options.sp,
        activation_checkpointing=mode,
        dp_mesh_name=("replicas", "data_parallel") if options.replicas > 1 else "data_parallel",
    )


def _config(name: str) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("planning for a model by its config needs transformers: pip install transformers") from error
    kinds = transformers.CONFIG_MAPPING
    try:
        return kinds[name]() if name in kinds else transformers.AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, KeyError) as error:
        raise ValueError(f"{name!r} is neither a folder with a config.json nor a model type of transformers") from error
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise ValueError(f"the config of {name!r} is refused by transformers: {error}") from error


def _model(config: object, dtype: torch.dtype) -> nn.Module:
    try:
        return importlib.import_module("transformers").AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    except Exception as error:  # whatever a model's own code meets in such a config
        raise ValueError(f"the config makes no model: {type(error).__name__}: {error}") from error


def _dtype(option: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{option} {name!r} is not a floating-point dtype of torch such as bfloat16")
    return dtype


if __name__ == "__main__":
    sys.exit(main())
