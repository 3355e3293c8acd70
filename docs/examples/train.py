"""Train a transformers model of text, or of images and text, over any layout of its ranks.

    torchrun --nproc-per-node 4 docs/examples/train.py --pp 2 --dp 2 --ep 2

    torchrun --nproc-per-node 4 docs/examples/train.py --model FOLDER --text chats.jsonl

    torchrun --nproc-per-node 4 docs/examples/train.py --config qwen2_5_vl --images --pp 2 --dp 2

Every choice has a default that works on four CPU processes; `--help` lists them. With `--model` it fine-tunes a Hugging
Face folder, and writes one that `from_pretrained` loads; else it trains random weights on bytes, for a first look.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

import am_fsdp
import am_moe
import am_pipeline
from am_fsdp.process_group import Stop
from am_moe.context_parallel.support import mixers
from training import checkpoint, memory, page, session
from training.agreement import refuse_differences
from training.degrees import Degrees
from training.examples import IGNORED, Examples
from training.image_chats import ImageChats
from training.layout import Layout, lay_out
from training.made_up_images import MadeUpImages
from training.model import (
    TokenMean,
    build_config,
    build_model,
    build_optimizer,
    model_in_4_bits,
    model_without_weights,
    next_token_loss,
)
from training.rate import Rate
from training.report import LossLog, Progress, plot_loss
from training.start import begin
from training.text import ByteText
from training.vision import build_vision_config, freeze_towers
from training.watch import Watch

# --check holds the loss to --tolerance for this many steps, and to five per cent for good: rounding that differs in the
# last bit grows as training goes on, most where it tips a router's choice.
EXACT_STEPS = 20

Text = ByteText | Examples | MadeUpImages | ImageChats


@record
def main() -> None:
    args = parse_arguments()
    launchers, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=args.timeout)))
    store = session.join(launchers, rank, world_size, args.timeout)
    with Watch(store, rank, world_size, args.timeout):  # of an error that all ranks have, one prints the traceback
        config = (build_vision_config if args.images else build_config)(args.model or args.config, args.size)
        text = read_text(args, args.text, config)
        arguments = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
        sizes = hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()[:12]
        tried = read_text(args, args.eval_text, config) if args.eval_text else None
        contents = {"the digest of --text": text.digest(), "the digest of the config": sizes}
        contents |= {"the digest of --eval-text": tried.digest()} if tried else {}
        refuse_differences(store, rank, world_size, arguments | contents)
        degrees = Degrees(args.pp, args.dp_replicate, args.dp, args.cp, args.tp, args.ep, args.sequence_parallel)
        degrees.check(world_size, config.get_text_config(), args.batch, args.microbatch, args.seq_len)
        text.check(args.seq_len)
        if args.resume:
            checkpoint.latest(args.out)

    # The watch inside: when a rank fails, nobody waits for the process group of the others.
    with am_fsdp.stop_on_signal() as stop, Watch(store, rank, world_size, args.timeout) as watch:
        train(args, degrees, config, text, tried, start(store, rank, world_size), stop, watch)


def train(
    args: argparse.Namespace,
    degrees: Degrees,
    config: Any,
    text: Text,
    tried: Examples | ImageChats | None,
    device: torch.device,
    stop: Stop,
    watch: Watch,
) -> None:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = build(args, config, device)
    if args.model and args.packed and (states := mixers(model)):
        raise ValueError(f"--packed: {states[0][0]} keeps a state from one text of a row to the next; leave it out")
    alone = Alone(model, args) if args.check and dist.get_rank() == 0 else None
    meshes = degrees.meshes(device.type)
    loss_fn = TokenMean(args.batch // args.microbatch * degrees.cp)
    layout = lay_out(
        model,
        degrees,
        meshes,
        schedule=args.schedule,
        microbatch=args.microbatch,
        local_batch=args.batch // degrees.dp,
        device=device,
        loss_fn=loss_fn,
        mp_policy=half if args.dtype == "bfloat16" else None,
        recompute=args.recompute,
        compile_with=args.compile,
    )
    del model
    for part in layout.parts if args.model and not args.load_in_4bit else ():
        am_fsdp.load_hf_weights(part, args.model, device=device, strict=degrees.pp == 1)
    optimizers = [build_optimizer(part, args.lr) for part in layout.parts]
    rate = Rate(args.lr, args.warmup, args.steps, args.decay)
    resume_from = begin(args.out, args.resume)
    done = checkpoint.load(resume_from, layout.parts, optimizers) if resume_from else 0
    if done >= args.steps:
        say(f"{args.out} has trained for {done} steps; --steps {args.steps} asks for no more")
        unwritten = [args.model and not folder_of(args).exists()]  # it ended after its last checkpoint, and before this
        dist.broadcast_object_list(unwritten, 0)
        if unwritten[0]:
            say(f"what was trained is in {save_folder(layout, degrees, args)}")
        finish(None, device)
    if alone:
        alone.replay(text, done)

    say(f"{type(layout.parts[0]).__name__} over {degrees}, {text.source}")
    held = memory.of_every_rank(memory.weights_held(layout.parts) / 1e6, device)
    say(f"weights per rank: {', '.join(f'{megabytes:,.2f}' for megabytes in held)} MB")
    progress = Progress(args.steps, done, args.batch * args.seq_len, enabled=dist.get_rank() == 0)
    mine = degrees.rows(meshes[0], args.batch)
    log = LossLog(args.out / "losses.txt", done, enabled=dist.get_rank() == 0)
    if args.packed:
        watch.at("whether packed texts are kept apart")
        refuse_mixed_texts(layout, text, loss_fn, mine, device, args)
    for step in range(done, args.steps):
        watch.at(f"step {step + 1}")
        torch.manual_seed(1_000_003 * args.seed + 1_009 * step + mine.start)  # dropout goes on where a checkpoint was
        batch = text.batch(args.batch, args.seq_len, args.seed, step)
        loss_fn.expect(batch[1])
        ids, labels, more = share_of(batch, mine, device, args.microbatch)
        rate.set(step, optimizers)
        loss = layout.step(ids, labels, **more)
        norm = am_fsdp.clip_grad_norm_(
            [named for part in layout.parts for named in part.named_parameters()],
            args.clip,
            pipeline_shards=degrees.pp,
            duplicates=layout.duplicates,
            error_if_nonfinite=True,
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        log.add(mean_over_world(loss, device))
        progress.update(step, log.losses[-1], float(norm))
        if alone:
            alone.step(text, step, log.losses[-1], float(norm))
        if tried and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            watch.at(f"the evaluation after step {step + 1}")
            say(f"step {step + 1:5d}  evaluation loss {evaluate(layout, tried, loss_fn, mine, device, args):.6f}")
        stopping = stop.requested()
        due = step + 1 == args.steps or (args.save_every and (step + 1) % args.save_every == 0)
        if due or stopping:
            watch.at(f"the checkpoint after step {step + 1}")
            log.make_durable()
            checkpoint.save(args.out, step + 1, layout.parts, optimizers)
        if stopping and step + 1 < args.steps:
            say(f"stopped by a signal after step {step + 1}; --resume continues")
            return
    progress.close()

    watch.at("the report")
    draw_last_step(layout, degrees, meshes[0], (ids, labels, more), args)
    most = memory.of_every_rank(memory.most_in_use(device) / 1e6, device)
    entropy = text.unigram_entropy()
    if args.model:
        watch.at("the folder")
        written = save_folder(layout, degrees, args)
        say(f"what was trained is in {written}")
    if dist.get_rank() == 0:
        title = f"{config.model_type}, {degrees}"
        unit = "token" if args.model else "byte"
        plot_loss(str(args.out / "loss.png"), log.losses, entropy, alone.losses if alone else [], title, unit)
        facts = {
            "layout": str(degrees),
            "text": text.source,
            "loss": f"{log.losses[0]:.4f} → {log.losses[-1]:.4f}",
            "tokens per second": f"{page.typical(progress.speeds):,.0f}",
            "compared with one process": alone.words() if alone else "no (--check)",
        }
        of_ranks = {"weights, MB": held, "most memory in use, MB": most}
        page.write_report(args.out, title, facts, of_ranks, progress.norms, progress.speeds)
        say(
            f"loss {log.losses[0]:.4f} -> {log.losses[-1]:.4f}; unigram entropy {entropy:.4f}; "
            f"pictures in {args.out}, all on one page in {args.out / 'report.html'}"
        )
    finish(alone, device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_argument_group("model and text")
    model.add_argument("--model", help="a Hugging Face folder to fine-tune, with a tokenizer; needs --text")
    model.add_argument(
        "--config", default="qwen3_moe", help="a local HF config folder or a model type, without --model"
    )
    model.add_argument("--size", type=int, default=1, help="multiplies the model's widths")
    model.add_argument("--lora", type=int, default=0, help="train LoRA adapters of this rank over the frozen model")
    model.add_argument(
        "--images",
        action="store_true",
        help="a model of images and text; with --config made-up images, with --model those of the chats in --text",
    )
    model.add_argument("--freeze-tower", action="store_true", help="with --images, what sees images is not trained")
    model.add_argument(
        "--load-in-4bit", action="store_true", help="with --lora, a frozen model in 4 bits (bitsandbytes)"
    )
    model.add_argument("--text", help="a file or folder; the Python standard library if not given; with --model .jsonl")
    model.add_argument("--packed", action="store_true", help="with --model, several texts to a row, kept apart")
    model.add_argument("--eval-text", help="with --model, a file to evaluate on")
    model.add_argument("--eval-every", type=int, default=50, help="steps between evaluations, besides the last")
    layout = parser.add_argument_group("layout; pp x dp-replicate x dp x cp x tp must be the number of ranks")
    layout.add_argument("--pp", type=int, default=2, help="pipeline stages' ranks")
    layout.add_argument("--dp", type=int, default=2, help="data-parallel ranks, sharded with FSDP2")
    layout.add_argument("--dp-replicate", type=int, default=1, help="copies of those, which average gradients (HSDP)")
    layout.add_argument("--cp", type=int, default=1, help="context-parallel ranks, each with a part of every sequence")
    layout.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    layout.add_argument("--ep", type=int, default=None, help="ranks of a pipeline stage that share the experts")
    layout.add_argument("--sequence-parallel", action="store_true", help="shard the sequence between layers over tp")
    layout.add_argument("--schedule", default="1F1B", help="any schedule of torch.distributed.pipelining")
    steps = parser.add_argument_group("training")
    steps.add_argument("--steps", type=int, default=200)
    steps.add_argument("--batch", type=int, default=16, help="sequences per step, over all ranks")
    steps.add_argument("--microbatch", type=int, default=2, help="sequences per microbatch")
    steps.add_argument("--seq-len", type=int, default=128)
    steps.add_argument("--lr", type=float, help="3e-3; with --model 1e-5, with adapters 2e-4")
    steps.add_argument("--warmup", type=int, default=0, help="steps in which the rate grows to --lr")
    steps.add_argument("--decay", choices=["constant", "cosine"], default="constant", help="of the rate, after that")
    steps.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="to compute in; bfloat16 keeps weights and sums of gradients in float32",
    )
    steps.add_argument("--recompute", action="store_true", help="recompute layers in the backward")
    steps.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile each layer, with inductor or the backend named",
    )
    steps.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
    steps.add_argument("--seed", type=int, default=0)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/train"), help="pictures and checkpoints")
    run.add_argument("--save-every", type=int, default=0, help="steps between checkpoints; one is written at the end")
    run.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    run.add_argument("--timeout", type=float, default=600, help="seconds without a step after which a run is ended")
    run.add_argument("--check", action="store_true", help="train on one process beside it and fail if they part")
    run.add_argument("--tolerance", type=float, help="largest relative difference of loss with --check; 1e-5, or 3e-2")
    args = parser.parse_args()
    if args.model and not args.text:
        parser.error("--model needs --text, a .jsonl file of texts or chats")
    if args.model and pathlib.Path(args.model).resolve().is_relative_to(args.out.resolve()):
        parser.error(
            f"--model {args.model} lies in --out {args.out}, where this run writes its own: name another --out"
        )
    if args.model and args.size != 1:
        parser.error("--size is for --config; a folder's model is as it is")
    if (args.packed or args.eval_text) and not args.model:
        parser.error("--packed and --eval-text need --model")
    if args.freeze_tower and not args.images:
        parser.error("--freeze-tower is for models with --images")
    if args.images and (args.packed or args.cp > 1):
        parser.error("--images goes with neither --packed nor --cp: a row is one chat with its images, whole on a rank")
    if args.load_in_4bit and not (args.model and args.lora > 0):
        parser.error("--load-in-4bit needs --model and --lora: packed weights are not trained")
    if args.lr is None:
        args.lr = (2e-4 if args.lora else 1e-5) if args.model else 3e-3
    if args.tolerance is None:
        args.tolerance = 1e-5 if args.dtype == "float32" else 3e-2
    if args.ep is None:
        args.ep = args.dp if not args.model and args.config == "qwen3_moe" and args.tp == 1 else 1
    if args.compile and args.compile not in (known := torch.compiler.list_backends(exclude_tags=())):
        parser.error(f"--compile {args.compile}: torch has no such backend; it has {', '.join(known)}")
    for name in ("lora", "save_every"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    if not args.clip > 0:
        parser.error("--clip must be more than 0: gradients are scaled to it, or down; inf leaves them as they are")
    for name in ("steps", "batch", "microbatch", "seq_len", "timeout", "eval_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def start(store: dist.Store, rank: int, world_size: int) -> torch.device:
    """NCCL with one GPU per local rank where there are that many, gloo on CPU else."""
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_world:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, device_id=device)
        return device
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    return torch.device("cpu")


def mean_over_world(loss: torch.Tensor | None, device: torch.device) -> float:
    """The mean over the ranks that have a loss: those of last stages, one per data-parallel share."""
    pair = torch.zeros(2, dtype=torch.float64, device=device)
    if loss is not None:
        pair += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    dist.all_reduce(pair)
    return float(pair[0] / pair[1])


def read_text(args: argparse.Namespace, path: str | None, config: Any) -> Text:
    if not args.model:
        text = ByteText(path)
        return MadeUpImages(text, build_model(config, args.seed, images=True)) if args.images else text
    if args.images:
        return ImageChats(path, AutoProcessor.from_pretrained(args.model, local_files_only=True), args.seq_len)
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    return Examples(path, tokenizer, args.seq_len, args.packed)


def build(args: argparse.Namespace, config: Any, device: torch.device) -> torch.nn.Module:
    """The model that is trained, with its adapters, and with a frozen tower if that is asked for."""
    if args.load_in_4bit:
        dtype = getattr(torch, args.dtype)
        model = model_in_4_bits(args.model, args.lora, args.seed, dtype, device, args.images)
    elif args.model:
        model = model_without_weights(args.model, args.lora, args.seed, args.images)
    else:
        model = build_model(config, args.seed, args.lora, args.images)
    if args.freeze_tower:
        freeze_towers(model)
    return model


def share_of(
    batch: tuple, rows: slice, device: torch.device, microbatch: int
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """This rank's rows of a batch; images as lists, with what belongs to each microbatch."""
    ids, labels, more = batch
    if callable(more):
        each = [more(slice(start, start + microbatch)) for start in range(rows.start, rows.stop, microbatch)]
        names = sorted({name for inputs in each for name in inputs})
        more = {name: [inputs[name].to(device) if name in inputs else None for inputs in each] for name in names}
    else:
        more = {name: tensor[rows].to(device) for name, tensor in more.items()}
    return ids[rows].to(device), labels[rows].to(device), more


def evaluate(
    layout: Layout, text: Examples, loss_fn: TokenMean, mine: slice, device: torch.device, args: argparse.Namespace
) -> float:
    """The mean loss over all labels of a text, without dropout."""
    return loss_over(text.every_row(args.batch), layout, loss_fn, mine, device, args.microbatch)


def refuse_mixed_texts(
    layout: Layout, text: Examples, loss_fn: TokenMean, mine: slice, device: torch.device, args: argparse.Namespace
) -> None:
    """Refuse `--packed` for a model whose attention lets a text see those before it in its row: tried with numbers.

    Raises:
        ValueError: on every rank, before the first step.
    """
    losses = [
        loss_over([b], layout, loss_fn, mine, device, args.microbatch) for b in text.with_other_neighbours(args.batch)
    ]
    if losses and abs(losses[0] - losses[1]) > (1e-6 if args.dtype == "float32" else 1e-3) * losses[0]:
        raise ValueError(
            f"--packed: {type(layout.parts[0]).__name__} does not keep the texts of a row apart; the loss of one "
            f"depends on the one before it ({losses[0]:.6f} and {losses[1]:.6f}); leave it out"
        )


def loss_over(
    batches: Iterable[tuple],
    layout: Layout,
    loss_fn: TokenMean,
    mine: slice,
    device: torch.device,
    microbatch: int,
) -> float:
    """The mean over all labels of the batches."""
    total = number = 0.0
    for part in layout.parts:
        part.eval()
    for batch in batches:
        loss_fn.expect(batch[1])
        ids, labels, more = share_of(batch, mine, device, microbatch)
        counted = int((batch[1] != IGNORED).sum())
        total += counted * mean_over_world(layout.evaluate(ids, labels, **more), device)
        number += counted
    for part in layout.parts:
        part.train()
    return total / number


def folder_of(args: argparse.Namespace) -> pathlib.Path:
    return args.out / ("adapter" if args.lora else "model")


def save_folder(layout: Layout, degrees: Degrees, args: argparse.Namespace) -> pathlib.Path:
    """What was trained as a folder that `from_pretrained` loads, its tokenizer beside it; with `--lora` the adapter."""
    folder = folder_of(args)
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)  # of an earlier end of this run
    dist.barrier()
    before = AutoConfig.from_pretrained(args.model, local_files_only=True)
    for part in layout.parts:  # recomputation turns the cache off, which is not for those who use the model
        if hasattr(before, "use_cache"):
            part.config.use_cache = before.use_cache
    adapters = "adapter" if args.lora else None
    am_fsdp.save_hf_weights(layout.parts, folder, adapters=adapters, pipeline_parts=degrees.pp > 1)
    if dist.get_rank() == 0:
        kind = AutoProcessor if args.images else AutoTokenizer
        kind.from_pretrained(args.model, local_files_only=True).save_pretrained(folder)
    return folder


def draw_last_step(
    layout: Layout, degrees: Degrees, world_mesh: DeviceMesh, batch: tuple, args: argparse.Namespace
) -> None:
    """Run one more step, without an optimizer step, and draw what the schedule did and which experts were chosen."""
    ids, labels, more = batch
    with_experts = [part for part in layout.parts if degrees.ep > 1 and am_moe.find_experts(part)]
    loads = [am_moe.ExpertLoad(part) for part in with_experts if not args.compile]  # which would compile anew
    counted = world_mesh["dp_replicate", "dp_shard", "cp"]
    if layout.stages:
        with am_pipeline.record_timeline(layout.stages) as events:
            layout.step(ids, labels, **more)
        everyone = am_pipeline.gather_timeline(events, layout.stages)
        if dist.get_rank() == 0:
            title = f"{args.schedule}, {args.batch // args.dp_replicate // args.dp // args.microbatch} microbatches"
            am_pipeline.plot_timeline(everyone, str(args.out / "timeline.png"), title)
    elif loads:
        layout.step(ids, labels, **more)
    mine = {layer: choices for load in loads for layer, choices in load.total(counted).items()}
    of_stages: list = [None] * dist.get_world_size()
    dist.all_gather_object(of_stages, {layer: choices.cpu() for layer, choices in mine.items()})
    choices = {layer: some[layer] for some in of_stages for layer in some}
    if dist.get_rank() == 0 and choices:
        am_moe.plot_load(choices, str(args.out / "load.png"), "the last step,", degrees.ep)


class Alone:
    """The same model trained by rank 0 alone on the whole batch: what the parallel run is compared with."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace) -> None:
        self.args = args
        if args.load_in_4bit:
            self.model = copy.deepcopy(model)
        else:  # context parallelism changes the other's config
            self.model = build(args, copy.deepcopy(model.config), torch.device("cpu"))
            if args.model:
                am_fsdp.load_hf_weights(self.model, args.model)
        self.rate = Rate(args.lr, args.warmup, args.steps, args.decay)
        self.optimizer = build_optimizer(self.model, args.lr)
        self.losses: list[float] = []
        self.worst_loss = self.worst_norm = self.worst_ever = 0.0

    def agrees(self) -> bool:
        """Norms are sums of many roundings; one that misses or doubles a contribution is off by far more than this."""
        exact = self.worst_loss <= self.args.tolerance and self.worst_norm <= 100 * self.args.tolerance
        return exact and self.worst_ever <= 5e-2

    def words(self) -> str:
        return (
            f"largest relative difference of the loss {self.worst_loss:.1e} and of the gradient norm "
            f"{self.worst_norm:.1e} in the first {EXACT_STEPS} steps, of the loss {self.worst_ever:.1e} in all"
        )

    def replay(self, text: Text, steps: int) -> None:
        """Catch up with a resumed run."""
        for step in range(steps):
            self._train(text, step)

    def step(self, text: Text, step: int, loss: float, norm: float) -> None:
        mine, my_norm = self._train(text, step)
        self.losses.append(mine)
        difference = abs(loss - mine) / abs(mine)
        self.worst_ever = max(self.worst_ever, difference)
        if len(self.losses) <= EXACT_STEPS:
            self.worst_loss = max(self.worst_loss, difference)
            self.worst_norm = max(self.worst_norm, abs(norm - my_norm) / abs(my_norm))

    def _train(self, text: Text, step: int) -> tuple[float, float]:
        ids, labels, more = text.batch(self.args.batch, self.args.seq_len, self.args.seed, step)
        more = more(slice(0, len(ids))) if callable(more) else more
        self.rate.set(step, [self.optimizer])
        loss = next_token_loss(self.model(ids, use_cache=False, **more).logits, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def finish(alone: Alone | None, device: torch.device) -> None:
    """Every rank exits with the verdict of the check."""
    parted = torch.tensor(int(alone is not None and not alone.agrees()), device=device)
    dist.broadcast(parted, 0)
    if alone:
        say(f"check: the run {'PARTS from' if parted else 'agrees with'} one process; {alone.words()}")
    # Not sys.exit: a gloo thread that lets go of its last work while the interpreter finalises aborts the process, and
    # a run whose work is done would be reported as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(parted))


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
