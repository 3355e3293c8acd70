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


def arguments(folder, **more):
    from transformers import TrainingArguments

    settings = {
        "output_dir": str(folder),
        "use_cpu": device_type() == "cpu",
        "per_device_train_batch_size": ROWS,
        "per_device_eval_batch_size": ROWS,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "adam_epsilon": 1e-3,  # a step of Adam from a gradient that is nothing but rounding is a whole one
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **more})


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


LAYOUTS = {
    "data 2": ((2,), ("data_parallel",)),
    "tensor 2": ((1, 2), ("data_parallel", "tensor_parallel")),
    "data 2, tensor 2": ((2, 2), ("data_parallel", "tensor_parallel")),
}


@pytest.mark.parametrize(
    ("layout", "accumulate", "number"),
    [
        pytest.param("data 2", 1, 8, marks=pytest.mark.ranks(2, timeout=120), id="data 2, two epochs"),
        pytest.param("data 2", 2, 40, marks=pytest.mark.ranks(2, timeout=120), id="data 2, accumulated"),
        pytest.param("data 2, tensor 2", 1, 40, marks=pytest.mark.ranks(4, timeout=120), id="data 2, tensor 2"),
    ],
)
def test_trainer_trains_evaluates_saves_and_resumes(layout, accumulate, number, tmp_path):
    from transformers import AutoModelForCausalLM

    shape, names = LAYOUTS[layout]
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=names)
    one = tiny("llama", layers=2, attention="sdpa")
    data = rows(number)
    wanted = copy.deepcopy(one)
    alone(wanted, 2, data, accumulate)

    def trainer(folder):
        return trainer_of(one, mesh, folder, data, eval_dataset=data, gradient_accumulation_steps=accumulate)

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


def trainer_of(one, mesh, folder, data, **more):
    from laid_out_trainer import LaidOutTrainer

    own = {name: more.pop(name) for name in ("eval_dataset", "compute_metrics", "optimizers") if name in more}
    model = am_fsdp.fsdp2_strategy_parallelize(copy.deepcopy(one), mesh, torch.float64)
    args = arguments(folder, **more)
    return LaidOutTrainer(model=model, args=args, data_axis=mesh["data_parallel"], train_dataset=data, **own)


def batches_of(data, size):
    return [data[first : first + size] for first in range(0, len(data), size)]


def stacked(taken):
    return [torch.stack([row[name] for row in taken]).to(device_type()) for name in ("input_ids", "labels")]


@pytest.mark.parametrize("layout", ["data 2", "tensor 2"])
@pytest.mark.ranks(2, timeout=120)
def test_evaluation_and_prediction_take_every_row_once_as_one_process_does(layout, tmp_path):
    from transformers.trainer_pt_utils import LabelSmoother

    shape, names = LAYOUTS[layout]
    mesh = init_device_mesh(device_type(), shape, mesh_dim_names=names)
    one = tiny("llama", layers=1, attention="sdpa")

    def metrics(found):
        return {"rows": len(found.label_ids), "marked": int((found.label_ids != -100).sum())}

    for number in (7, 5, 1):
        data = rows(number, seed=5)
        losses, logits = [], []
        for taken in batches_of(data, ROWS):
            ids, labels = stacked(taken)
            with torch.no_grad():
                output = one(ids, use_cache=False)
            losses += [float(LabelSmoother(0.1)(output, labels, shift_labels=True))] * len(taken)
            logits.append(output.logits)

        more = {"label_smoothing_factor": 0.1, "compute_metrics": metrics}
        trainer = trainer_of(one, mesh, tmp_path / "run", data, eval_dataset=data, **more)
        found, predicted = trainer.evaluate(), trainer.predict(data)
        assert found["eval_loss"] == pytest.approx(sum(losses) / number, abs=TOLERANCE)
        assert found["eval_rows"] == number
        assert found["eval_marked"] == sum(int((row["labels"] != -100).sum()) for row in data)
        assert predicted.metrics["test_loss"] == pytest.approx(found["eval_loss"], abs=TOLERANCE)
        torch.testing.assert_close(
            torch.as_tensor(predicted.predictions), torch.cat(logits).cpu(), rtol=0, atol=TOLERANCE
        )


@pytest.mark.ranks(2, timeout=120)
def test_training_with_smoothed_labels_shifts_them_as_a_causal_model_does(tmp_path):
    from transformers.trainer_pt_utils import LabelSmoother

    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    one = tiny("llama", layers=1, attention="sdpa")
    data = rows(2 * ROWS)
    trainer = trainer_of(one, mesh, tmp_path / "run", data, max_steps=1, label_smoothing_factor=0.1)
    trainer.train()
    ids, labels = stacked(data)
    wanted = float(LabelSmoother(0.1)(one(ids, use_cache=False), labels, shift_labels=True))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.ranks(2, timeout=120)
def test_an_epoch_has_the_steps_of_one_process_and_the_best_model_is_loaded_at_its_end(tmp_path):
    from transformers import AutoModelForCausalLM

    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    one = tiny("llama", layers=1, attention="sdpa")
    for drop_last, steps in ((False, 3), (True, 2)):
        more = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1.0}
        more |= {"metric_for_best_model": "loss", "greater_is_better": True}  # that of the first step, not of the last
        more |= {"dataloader_drop_last": drop_last, "max_steps": -1, "num_train_epochs": 1, "save_only_model": True}
        trainer = trainer_of(one, mesh, tmp_path / str(drop_last), rows(10), eval_dataset=rows(4, seed=1), **more)
        trainer.train()
        assert (trainer.state.global_step, trainer.state.best_global_step) == (steps, 1)
        folder = pathlib.Path(trainer.state.best_model_checkpoint)
        best = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).to(device_type())
        assert_same(dict(trainer.model.named_parameters()), dict(best.named_parameters()), 0.0, "the best weights")
        again = trainer_of(one, mesh, tmp_path / str(drop_last), rows(10), max_steps=steps + 1, save_strategy="no")
        with pytest.warns(UserWarning, match="begin anew"):
            again.train(resume_from_checkpoint=str(folder))


@pytest.mark.ranks(2, timeout=120)
def test_adapters_are_resumed(tmp_path):
    peft = pytest.importorskip("peft")
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    one = tiny("llama", layers=1, attention="sdpa")
    torch.manual_seed(0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), one)
    data = rows(16)
    first = trainer_of(one, mesh, tmp_path / "run", data)
    first.train()
    again = trainer_of(one, mesh, tmp_path / "run", data)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(
        {name: p.full_tensor() for name, p in again.model.named_parameters()},
        {name: p.full_tensor() for name, p in first.model.named_parameters()},
        0.0,
        "weights after resuming",
    )
    bare = trainer_of(one, mesh, tmp_path / "bare", data, max_steps=1, save_only_model=True)
    bare.train()
    with pytest.raises(ValueError, match="save_only_model"):
        bare.train(resume_from_checkpoint=str(tmp_path / "bare" / "checkpoint-1"))


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows(4))


@pytest.mark.ranks(2, timeout=120)
def test_what_it_cannot_honour_is_refused_by_name(tmp_path):
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("data_parallel",))
    one, data = tiny("llama", layers=1, attention="sdpa"), rows(8)
    for setting, value in {
        "optim": "adafactor",
        "train_sampling_strategy": "group_by_length",
        "batch_eval_metrics": True,
        "eval_use_gather_object": True,
    }.items():
        with pytest.raises(ValueError, match=f"does not take {setting}"):
            trainer_of(
                one,
                mesh,
                tmp_path,
                data,
                eval_dataset=data,
                compute_metrics=lambda found, compute_result: {},
                **{setting: value},
            )
    with pytest.raises(ValueError, match="_Stream"):
        trainer_of(one, mesh, tmp_path, _Stream())
    with pytest.raises(ValueError, match="_Stream"):
        trainer_of(one, mesh, tmp_path, data).predict(_Stream())


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
