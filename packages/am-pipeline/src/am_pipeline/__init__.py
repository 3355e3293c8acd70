"""Pipeline parallelism for Hugging Face models: cut, shape, schedule, train."""

from importlib.metadata import version

from am_pipeline.cut import CutPlan, build_part, plan_cut
from am_pipeline.pipeline import ParallelizeFnProtocol, pipeline_model
from am_pipeline.placement import (
    calculate_virtual_stages,
    generate_hf_model_fqn_per_model_part,
    stage_ids_this_rank,
)
from am_pipeline.schedule import build_pipeline_schedule, scale_grads_by_divisor
from am_pipeline.shapes import reset_pp_stage_shapes
from am_pipeline.shared import duplicate_parameters
from am_pipeline.split import split_model_into_stages
from am_pipeline.timeline import gather_timeline, plot_timeline, record_timeline

__version__ = version("am-pipeline")

__all__ = [
    "CutPlan",
    "ParallelizeFnProtocol",
    "build_part",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "duplicate_parameters",
    "gather_timeline",
    "generate_hf_model_fqn_per_model_part",
    "pipeline_model",
    "plan_cut",
    "plot_timeline",
    "record_timeline",
    "reset_pp_stage_shapes",
    "scale_grads_by_divisor",
    "split_model_into_stages",
    "stage_ids_this_rank",
]
