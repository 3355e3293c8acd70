"""transformers' Trainer for a model that is laid out already: sharded data, tensor and expert parallelism.

    model = AutoModelForCausalLM.from_config(config)                       on meta, or with weights
    fsdp2_strategy_parallelize(model, mesh, torch.float32)
    trainer = LaidOutTrainer(model=model, args=args, data_axis=mesh["data_parallel"], train_dataset=…)
    trainer.train(resume_from_checkpoint=…)

Trainer would put DDP around the model, which accelerate refuses for sharded parameters, give every rank its own rows,
though those of a tensor-parallel group need the same, and write each rank's shards as if they were the model. This
class leaves the model as it is, cuts the data along the data axis, and writes folders that `from_pretrained` loads.
"""

from __future__ import annotations

import functools
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import recursively_apply
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import am_fsdp

OPTIMIZER = "optimizer_shards"  # and the adapters, where the model has some
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")  # each number of a weight by itself


class LaidOutTrainer(Trainer):
    """Trains, evaluates, saves and resumes; `per_device_train_batch_size` is of a rank of the data axis.

    Args:
        data_axis: the ranks between which the data are cut, one-dimensional; all others get the same rows. Where the
            training rows do not divide between them some come twice, so that all ranks take as many steps.
        model, …: as for `Trainer`. A pipeline's parts cannot be trained so.

    Raises:
        ValueError: a setting or a dataset that it cannot honour, by name.
    """

    def __init__(self, *args: Any, data_axis: DeviceMesh, **kwargs: Any) -> None:
        self.data_axis = data_axis
        super().__init__(*args, **kwargs)
        self._refuse()
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        names = {cls.__name__ for cls in type(base).__mro__}  # FSDP puts a class of its own before the model's
        if self.label_smoother is not None and names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    def _refuse(self) -> None:
        args, adapters = self.args, hasattr(self.model, "peft_config")
        own_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        known = f"of those by name only {', '.join(OPTIMIZERS)} work on shards; pass any other in `optimizers`"
        refused = {
            f"optim={args.optim.value!r}": (args.optim not in OPTIMIZERS and not own_optimizer, known),
            f"train_sampling_strategy={args.train_sampling_strategy!r}": (
                args.train_sampling_strategy not in ("random", "sequential"),
                "rows are cut along data_axis in a random order, or in their own",
            ),
            "batch_eval_metrics": (args.batch_eval_metrics, "metrics are computed once, of all rows"),
            "eval_use_gather_object": (args.eval_use_gather_object, "predictions are gathered as tensors"),
            "load_best_model_at_end": (
                args.load_best_model_at_end and args.save_only_model and adapters,
                "adapters are read from what save_only_model leaves out",
            ),
        }
        for setting, (wrong, why) in refused.items():
            if wrong:
                raise ValueError(f"LaidOutTrainer does not take {setting}: {why}")
        several = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in (self.train_dataset, *several):
            _check_length(dataset)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def leave_in_place(model: nn.Module, **_: Any) -> nn.Module:
            return prepare(model, device_placement=False, evaluation_mode=True)  # no DDP around it

        self.accelerator.prepare_model = leave_in_place
        self.gather_function = self.accelerator.gather_for_metrics = self._gather_rows

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.data_axis.size()

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        sampler = DistributedSampler(
            self.train_dataset,
            num_replicas=self.data_axis.size(),
            rank=self.data_axis.get_local_rank(),
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        batches = _Batches(sampler, self._train_batch_size, args.dataloader_drop_last)
        return _Loader(self.train_dataset, batch_sampler=batches, **self._loading())

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return self.get_test_dataloader(self.eval_dataset if dataset is None else dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        _check_length(test_dataset)
        rank, ranks = self.data_axis.get_local_rank(), self.data_axis.size()
        batches = eval_batches(len(test_dataset), self.args.eval_batch_size, rank, ranks)
        loader = _EvalLoader(test_dataset, batch_sampler=batches, **self._loading())
        loader.rows_of_step = self.args.eval_batch_size * ranks
        return loader

    def _loading(self) -> dict[str, Any]:
        args = self.args
        return {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """A batch's loss is the mean of its own tokens, as in one process, and not of those of all ranks' batches."""
        across = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = across

    def _gather_rows(self, tensors: Any) -> Any:
        """The rows of one step of evaluation, in their order: this rank's and those of the others of the data axis."""
        batch, rows = self.args.eval_batch_size, self.callback_handler.eval_dataloader.rows_left

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0 or len(tensor) > batch:
                raise ValueError(f"an output of shape {tuple(tensor.shape)} is no batch of rows; put it in ignore_keys")
            filled = tensor.new_zeros(batch, *tensor.shape[1:])
            filled[: len(tensor)] = tensor
            parts = [torch.empty_like(filled) for _ in range(self.data_axis.size())]
            dist.all_gather(parts, filled, group=self.data_axis.get_group())
            return torch.cat(parts)[:rows]

        return recursively_apply(gather, tensors)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = pathlib.Path(output_dir or self.args.output_dir)
        if self.args.should_save:  # Trainer writes over what an earlier run has left; save_hf_weights refuses to
            for old in folder.glob("*.safetensors*"):
                old.unlink()
        dist.barrier()
        adapters = "adapter" if hasattr(self.model, "peft_config") else None
        am_fsdp.save_hf_weights(self.model, folder, adapters=adapters)
        if self.args.should_save:
            torch.save(self.args, folder / "training_args.bin")
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return am_fsdp.clip_grad_norm_(model.named_parameters(), self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer), **self._adapters()}
        dcp.save(state, checkpoint_id=pathlib.Path(output_dir) / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), pathlib.Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapters, shards = self._adapters(), pathlib.Path(resume_from_checkpoint) / OPTIMIZER
        if not adapters:
            am_fsdp.load_hf_weights(model or self.model, resume_from_checkpoint)
        elif shards.is_dir():
            dcp.load(adapters, checkpoint_id=shards)  # in place
        else:
            raise ValueError(f"{resume_from_checkpoint} was saved with save_only_model, which adapters cannot resume")

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _adapters(self) -> dict[str, Any]:
        if not hasattr(self.model, "peft_config"):
            return {}
        return {"adapters": {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        shards = pathlib.Path(checkpoint) / OPTIMIZER
        if not shards.is_dir():  # as Trainer does
            warnings.warn(
                f"{checkpoint} was saved with save_only_model: optimizer and schedule begin anew", stacklevel=2
            )
            return
        state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer)}
        dcp.load(state, checkpoint_id=shards)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"])
        schedule = torch.load(pathlib.Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)


def eval_batches(rows: int, batch: int, rank: int, ranks: int) -> list[list[int]]:
    """The rows of each of a rank's steps. 7 rows in batches of 2 on 2 ranks:

        rank 0: [0, 1] [4, 5]
        rank 1: [2, 3] [6]

    Every row comes once. A rank that has none left takes row 0, which `rows_left` cuts off what is gathered.
    """
    starts = (first + rank * batch for first in range(0, rows, ranks * batch))
    return [list(range(start, min(start + batch, rows))) or [0] for start in starts]


def _check_length(dataset: Any) -> None:
    if isinstance(dataset, IterableDataset) or (dataset is not None and not hasattr(dataset, "__len__")):
        raise ValueError(f"LaidOutTrainer cuts rows by their number, which {type(dataset).__name__} does not have")


class _Batches(BatchSampler):
    """Those of a `DistributedSampler`, in another order in each epoch; Trainer finds it here when it skips some."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class _EvalLoader(DataLoader):
    """Says how many rows are left as a step begins, this one's included."""

    rows_of_step = rows_left = 0

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(super().__iter__()):
            self.rows_left = len(self.dataset) - step * self.rows_of_step
            yield batch
