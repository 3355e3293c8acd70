"""FSDP2 strategies on a device mesh, with tensor and sequence parallelism and activation checkpointing."""

from importlib.metadata import version

from am_fsdp.checkpointing import checkpoint_layers
from am_fsdp.clipping import clip_grad_norm_
from am_fsdp.imports import import_class_from_path, import_classes_from_paths
from am_fsdp.load import load_hf_weights
from am_fsdp.nvfsdp import HAVE_NVFSDP, nvfsdp_strategy_parallelize
from am_fsdp.process_group import _destroy_dist_connection, stop_on_signal
from am_fsdp.replicas import check_replicas
from am_fsdp.save import save_hf_weights
from am_fsdp.strategy import fsdp2_strategy_parallelize
from am_fsdp.units import apply_fsdp_sharding_recursively
from am_fsdp.unshard import unshard_fsdp2_model
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
