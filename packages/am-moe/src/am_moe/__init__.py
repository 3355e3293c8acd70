"""Expert parallelism for Hugging Face mixture-of-experts models."""

from importlib.metadata import version

from am_moe.expert_parallel import ExpertParallel, apply_ep
from am_moe.experts import find_experts
from am_moe.fsdp import apply_fsdp

__version__ = version("am-moe")

__all__ = ["ExpertParallel", "apply_ep", "apply_fsdp", "find_experts"]
