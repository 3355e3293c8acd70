"""FSDP2 strategies on a device mesh, with tensor and sequence parallelism and activation checkpointing."""

from importlib.metadata import version

from am_fsdp.layout.checkpointing import checkpoint_layers
from am_fsdp.layout.clipping import clip_grad_norm_
from am_fsdp.layout.imports import import_class_from_path, import_classes_from_paths
from am_fsdp.layout.nvfsdp import HAVE_NVFSDP, nvfsdp_strategy_parallelize
from am_fsdp.layout.recursive import apply_fsdp_sharding_recursively
from am_fsdp.layout.replicas import check_replicas
from am_fsdp.layout.strategy import fsdp2_strategy_parallelize
from am_fsdp.layout.unshard import unshard_fsdp2_model
from am_fsdp.process_group import _destroy_dist_connection, stop_on_signal
from am_fsdp.weights.load import load_hf_weights
from am_fsdp.weights.save import save_hf_weights
from am_tp_plans import get_hf_tp_shard_plan, translate_to_torch_parallel_style

__version__ = version("am-fsdp")

__all__ = [
    "HAVE_NVFSDP",
    "_destroy_dist_connection",
    "apply_fsdp_sharding_recursively",
    "check_replicas",
    "checkpoint_layers",
    "clip_grad_norm_",
    "fsdp2_strategy_parallelize",
    "get_hf_tp_shard_plan",
    "import_class_from_path",
    "import_classes_from_paths",
    "load_hf_weights",
    "nvfsdp_strategy_parallelize",
    "save_hf_weights",
    "stop_on_signal",
    "translate_to_torch_parallel_style",
    "unshard_fsdp2_model",
]
