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

import pathlib
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler
from transformers import Trainer

import am_fsdp

OPTIMIZER = "optimizer_shards"


class LaidOutTrainer(Trainer):
    """Trains, evaluates, saves and resumes; `per_device_train_batch_size` is of a rank of the data axis.

    Args:
        data_axis: the ranks between which the data are cut, one-dimensional; all others get the same rows. Where rows
            do not divide between them some come twice, in evaluation too, so that all ranks take as many steps.
        model, …: as for `Trainer`. A pipeline's parts cannot be trained so.
    """

    def __init__(self, *args: Any, data_axis: DeviceMesh, **kwargs: Any) -> None:
        self.data_axis = data_axis
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def leave_in_place(model: nn.Module, **_: Any) -> nn.Module:
            return prepare(model, device_placement=False, evaluation_mode=True)  # no DDP around it

        self.accelerator.prepare_model = leave_in_place

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self._train_batch_size, shuffle=True)

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        return self._loader(dataset, self.args.eval_batch_size, shuffle=False)

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

    def _loader(self, dataset: Dataset, batch: int, shuffle: bool) -> DataLoader:
        place = {"num_replicas": self.data_axis.size(), "rank": self.data_axis.get_local_rank()}
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = DistributedSampler(dataset, **place, shuffle=shuffle, seed=seed)
        return _Loader(dataset, batch_sampler=_Batches(sampler, batch, shuffle), collate_fn=self.data_collator)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        return am_fsdp.clip_grad_norm_(model.named_parameters(), self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer)
        dcp.save({"optimizer": state}, checkpoint_id=pathlib.Path(output_dir) / OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), pathlib.Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        am_fsdp.load_hf_weights(model or self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer.optimizer)}
        dcp.load(state, checkpoint_id=pathlib.Path(checkpoint) / OPTIMIZER)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"])
        schedule = torch.load(pathlib.Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)


class _Batches(BatchSampler):
    """Those of a `DistributedSampler`, in another order in each epoch; Trainer finds it here when it skips some."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
