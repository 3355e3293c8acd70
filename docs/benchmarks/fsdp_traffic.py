"""All-gathers, reduce-scatters and bytes of one training step under FSDP2: this package, transformers, accelerate.

    torchrun --standalone --nproc-per-node 2 docs/benchmarks/fsdp_traffic.py

A Llama of eight layers (hidden 256, vocabulary 8000), tied and untied, fp32, two data ranks, the second step (the first
allocates). Bytes are those of whole tensors, after a gather or before a scatter.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism

from am_fsdp import fsdp2_strategy_parallelize

LAYERS = 8


class Counted(TorchDispatchMode):
    """The collectives of FSDP2 that run: how many, and the bytes of their whole tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = {"_allgather_base_": 0, "_reduce_scatter_base_": 0}
        self.bytes = dict(self.count)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("c10d::")
        if name in self.count:
            self.count[name] += 1
            self.bytes[name] += max(tensor.nbytes for tensor in args[:2])
        return function(*args, **(kwargs or {}))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        print("| embeddings | by | all-gathers | MiB | reduce-scatters | MiB |\n|---|---|---|---|---|---|")
    for tied in (False, True):
        for name, lay_out in (("am-fsdp", ours), ("transformers", native), ("accelerate", accelerated)):
            if tied and lay_out is native:
                continue  # its plan for tied weights is made while it loads a checkpoint
            model = lay_out(llama(tied))
            counted = [step(model) for _ in range(2)][1]
            gathers, scatters = counted.count.values()
            if dist.get_rank() == 0:
                sizes = [number / 2**20 for number in counted.bytes.values()]
                kind = "tied" if tied else "untied"
                print(f"| {kind} | {name} | {gathers} | {sizes[0]:.1f} | {scatters} | {sizes[1]:.1f} |")
    dist.barrier()
    os._exit(0)  # gloo may abort an interpreter that finalises


def llama(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def ours(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data_parallel",))
    return fsdp2_strategy_parallelize(model, mesh, torch.float32)


def native(model: nn.Module) -> nn.Module:
    class Axes:
        def get_mesh(self, _name: str):
            return init_device_mesh("cpu", (dist.get_world_size(),))

    named = model.fsdp_plan
    plan = {}
    for name, _ in model.named_modules():
        style = named.get(name) or named.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style:
            plan[name] = style
    return apply_fully_sharded_data_parallelism(model, Axes(), plan, {})


def accelerated(model: nn.Module) -> nn.Module:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    # `Accelerator` itself refuses FSDP on the CPU; this is the function that it calls.
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def step(model: nn.Module) -> Counted:
    ids = torch.arange(64)[None]
    with Counted() as counted:
        logits = model(ids, use_cache=False).logits
        nn.functional.cross_entropy(logits[0], ids[0]).backward()
    model.zero_grad()
    return counted


if __name__ == "__main__":
    main()
