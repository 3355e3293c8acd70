"""A laid-out model in transformers' Trainer, and in an accelerate loop, as `docs/examples` shows it."""

from __future__ import annotations

import copy
import pathlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import am_fsdp
from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.models import tiny

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

pytest.importorskip("accelerate")
STEPS, ROWS = 4, 2
TOLERANCE = 1e-5  # transformers computes its losses in float32


def rows(number=40, seed=0):
    ids = torch.randint(3, 96, (number, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": torch.where(row < 20 + place, row, -100)} for place, row in enumerate(ids)]


def arguments(folder, ranks, **more):
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=device_type() == "cpu",
        per_device_train_batch_size=ROWS,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=1e-2,
        max_grad_norm=0.1,
        adam_epsilon=1e-3,  # a step of Adam from a gradient that is nothing but rounding is a whole one
        report_to=[],
        disable_tqdm=True,
        **more,
    )


def alone(model, ranks, data, accumulate=1):
    """The same steps in plain torch: what each rank of the data axis takes, together."""
    samplers = [torch.utils.data.DistributedSampler(data, ranks, rank, shuffle=True, seed=42) for rank in range(ranks)]
    orders = []
    for sampler in samplers:
        orders.append([])
        for epoch in range(2):
            sampler.set_epoch(epoch)
            orders[-1] += list(sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.0)
    for step in range(STEPS):
        first = step * ROWS * accumulate
        taken = [data[place] for order in orders for place in order[first : first + ROWS * accumulate]]
        ids, labels = (torch.stack([row[name] for row in taken]).to(device_type()) for name in ("input_ids", "labels"))
        logits = model(ids, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (STEPS - step) / STEPS  # linear, Trainer's own
        optimizer.step()
        optimizer.zero_grad()


LAYOUTS = {"data 2": ((2,), ("data_parallel",)), "data 2, tensor 2": ((2, 2), ("data_parallel", "tensor_parallel"))}


@pytest.mark.parametrize(
    ("layout", "accumulate", "number"),
    [
        pytest.param("data 2", 1, 8, marks=pytest.mark.ranks(2, timeout=120), id="data 2, two epochs"),
        pytest.param("data 2", 2, 40, marks=pytest.mark.ranks(2, timeout=120), id="data 2, accumulated"),
        pytest.param("data 2, tensor 2", 1, 40, marks=pytest.mark.ranks(4, timeout=120), id="data 2, tensor 2"),
    ],
)
def test_trainer_trains_evaluates_saves_and_resumes(layout, accumulate, number, tmp_path):
    from laid_out_trainer import LaidOutTrainer
    from transformers import AutoModelForCausalLM

    shape, names = LAYOUTS[layout]
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=names)
    one = tiny("llama", layers=2, attention="sdpa")
    data = rows(number)
    wanted = copy.deepcopy(one)
    alone(wanted, 2, data, accumulate)

    def trainer(folder):
        model = am_fsdp.fsdp2_strategy_parallelize(copy.deepcopy(one), mesh, torch.float64)
        args = arguments(folder, 2, gradient_accumulation_steps=accumulate)
        return LaidOutTrainer(
            model=model, args=args, data_axis=mesh["data_parallel"], train_dataset=data, eval_dataset=data
        )

    first = trainer(tmp_path / "run")
    first.train()
    assert_same(dict(first.model.named_parameters()), dict(wanted.named_parameters()), TOLERANCE, "weights")
    assert first.evaluate()["eval_loss"] > 0
    again = trainer(tmp_path / "run")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same(
        dict(again.model.named_parameters()), dict(wanted.named_parameters()), TOLERANCE, "weights after resuming"
    )
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{STEPS}", dtype=torch.float64)
    assert_same(
        dict(loaded.to(device_type()).named_parameters()), dict(wanted.named_parameters()), TOLERANCE, "the folder"
    )


@pytest.mark.ranks(2, timeout=120)
def test_an_accelerate_loop_trains_it_when_the_model_is_left_out_of_prepare():
    from accelerate import Accelerator

    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    one = tiny("llama", layers=2, attention="sdpa")
    model = am_fsdp.fsdp2_strategy_parallelize(copy.deepcopy(one), mesh, torch.float64)
    accelerator = Accelerator(cpu=device_type() == "cpu")
    with pytest.raises((ValueError, NotImplementedError)):  # on a GPU, on the CPU: DDP around sharded parameters
        accelerator.prepare(model)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    mine = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(3):
        ids = torch.stack([row["input_ids"] for row in rows(4, step)]).to(device_type())
        share = ids.chunk(2)[dist.get_rank()]
        accelerator.backward(model(share, labels=share, use_cache=False).loss)
        one(ids, labels=ids, use_cache=False).loss.backward()
        for each in (optimizer, mine):
            each.step()
            each.zero_grad()
    assert_same(dict(model.named_parameters()), dict(one.named_parameters()), TOLERANCE, "weights")
