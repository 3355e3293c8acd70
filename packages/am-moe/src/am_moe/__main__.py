"""`python -m am_moe explain MODEL --ep N`: look at a layout of experts before anything is built."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
from torch import nn

from am_moe.explain import explain

_RANKS, _LAYERS, _EXPERTS = 1 << 20, 10_000, 1 << 20
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m am_moe", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("explain", help="who holds which experts, what a token sends, what a rank holds")
    command.add_argument("model", help="a folder or file with a config.json, or a model type such as qwen3_moe")
    command.add_argument("--ep", type=int, required=True, help="ranks on the expert axis")
    command.add_argument("--data", type=int, help="ranks with different tokens, a multiple of --ep; --ep if not given")
    options = parser.parse_args(arguments)
    try:
        ranks = max(options.ep, options.data or 1)
        if ranks > _RANKS:
            raise ValueError(f"{ranks} ranks are beyond what can be ({_RANKS}); look for a slip in the arguments")
        print(explain(_model_on_meta(options.model), options.ep, data=options.data))
    except (ValueError, ImportError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _model_on_meta(name: str) -> nn.Module:
    """A transformers causal LM on the meta device, from a folder or file with its config or a model type.

    Raises:
        ImportError: transformers is not installed.
        ValueError: neither a config nor a known type.
    """
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
    text = config.get_text_config(decoder=True)
    sizes = [getattr(text, name, None) for name in ("num_hidden_layers", *_COUNTS)]
    layers, *experts = (size if isinstance(size, int) else 0 for size in sizes)
    if layers > _LAYERS or max(experts) > _EXPERTS:
        raise ValueError(
            f"{layers} layers with {max(experts)} experts are beyond what can be ({_LAYERS}, {_EXPERTS} experts); "
            "look for a slip in the config"
        )
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # whatever a model's own code meets in such a config
        raise ValueError(f"the config of {name!r} makes no model: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
