"""`python -m am_pipeline plan MODEL` and `python -m am_pipeline timeline`: look before anything is built."""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys

import torch
from torch import nn

from am_pipeline.schedule.balance import BALANCES
from am_pipeline.schedule.estimate import plan_pipeline
from am_pipeline.schedule.order import SCHEDULES, peak_live, read_order, schedule_order, simulate
from am_pipeline.schedule.timeline import plot_timeline, text_timeline

_LAYERS = 10_000


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m am_pipeline", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="the stages of a model as a table")
    plan.add_argument("model", help="a folder with a config.json, or a model type of transformers such as llama")
    plan.add_argument("--layers-per-stage", type=int)
    plan.add_argument("--microbatch-size", type=int, default=1)
    plan.add_argument("--seq-len", type=int, default=2048)
    plan.add_argument("--balance", choices=[b for b in BALANCES if b != "time"], default="flops")
    plan.set_defaults(run=_plan)

    timeline = commands.add_parser("timeline", help="when each rank of a schedule would do what")
    timeline.add_argument("--csv", help="a schedule file instead of a name")
    timeline.add_argument("--stages-per-rank", type=int)
    timeline.add_argument("--out", help="draw to this file (.svg, .png, .pdf); needs matplotlib")
    timeline.add_argument("--width", type=int, default=0, help="columns; the terminal's if not given")
    timeline.set_defaults(run=_timeline)

    for command in (plan, timeline):
        command.add_argument("--ranks", type=int, default=4)
        command.add_argument("--schedule", choices=SCHEDULES, default="1F1B")
        command.add_argument("--microbatches", type=int, default=8)
    options = parser.parse_args(arguments)
    try:
        _refuse_absurd(options)
        print(options.run(options))
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_absurd(options: argparse.Namespace) -> None:
    """What is only counted may be large; a schedule has an action for each microbatch on each stage."""
    actions = options.ranks * options.microbatches * max(2, getattr(options, "stages_per_rank", None) or 2)
    sizes = [getattr(options, name, None) or 1 for name in ("layers_per_stage", "microbatch_size", "seq_len", "width")]
    if actions > 1_000_000 or max(sizes) > 1 << 31:
        raise ValueError(
            f"a schedule of {options.ranks} ranks and {options.microbatches} microbatches, or another size, is beyond "
            "what can be (a million actions, 2^31 for sizes); look for a slip in the arguments"
        )


def _plan(options: argparse.Namespace) -> str:
    made = plan_pipeline(
        _model_on_meta(options.model),
        options.ranks,
        options.schedule,
        microbatches=options.microbatches,
        microbatch_size=options.microbatch_size,
        seq_len=options.seq_len,
        layers_per_stage=options.layers_per_stage,
        balance=options.balance,
    )
    return str(made)


def _timeline(options: argparse.Namespace) -> str:
    if options.csv:
        order = read_order(options.csv, options.ranks)
    else:
        order = schedule_order(options.schedule, options.ranks, options.microbatches, options.stages_per_rank)
    events = simulate(order)
    name = options.csv or options.schedule
    if options.out:
        plot_timeline(events, options.out, name, unit="units of a forward")
    width = options.width or max(20, shutil.get_terminal_size((108, 20)).columns - 9)
    live = ", ".join(map(str, peak_live(order)))
    return f"{name}\n{text_timeline(events, width)}\npeak live activations by rank: {live}"


def _model_on_meta(name: str) -> nn.Module:
    """A transformers causal LM, or encoder-decoder, on meta, from a folder or file with its config or a model type.

    Raises:
        ImportError: transformers is not installed.
        ValueError: neither a config nor a known type.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("planning a model by its config needs transformers: pip install transformers") from error
    kinds = transformers.CONFIG_MAPPING
    try:
        config = (
            kinds[name]() if name in kinds else transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"{name!r} is neither a folder with a config.json nor a model type of transformers") from error
    except Exception as error:  # transformers validates with exceptions of many kinds
        raise ValueError(f"the config of {name!r} is refused by transformers: {error}") from error
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if layers > _LAYERS:
        raise ValueError(f"{layers} layers are beyond what can be ({_LAYERS}); look for a slip in the config")
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
        if type(config) not in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise ValueError(f"{name} takes no ids; plan it with plan_pipeline(model, ..., example_inputs=...)")
    try:
        with torch.device("meta"):
            return kind.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # whatever a model's own code meets in such a config
        raise ValueError(f"the config of {name!r} makes no model: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
