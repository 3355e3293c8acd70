"""Pipeline parallelism for Hugging Face models: cut, shape, schedule, train."""

from importlib.metadata import version

from am_pipeline.cut.plan import CutPlan, build_part, plan_cut
from am_pipeline.cut.split import split_model_into_stages
from am_pipeline.pipeline import ParallelizeFnProtocol, pipeline_model, set_sequence_shards
from am_pipeline.placement import (
    calculate_virtual_stages,
    generate_hf_model_fqn_per_model_part,
    stage_ids_this_rank,
)
from am_pipeline.schedule.balance import Costs
from am_pipeline.schedule.build import build_pipeline_schedule, scale_grads_by_divisor
from am_pipeline.schedule.estimate import PipelinePlan, StageEstimate, plan_pipeline
from am_pipeline.schedule.order import (
    Action,
    Event,
    bubble_fraction,
    check_order,
    peak_live,
    read_order,
    schedule_order,
    simulate,
)
from am_pipeline.schedule.timeline import gather_timeline, plot_timeline, record_timeline, text_timeline
from am_pipeline.step.schedule import PipelineSchedule
from am_pipeline.step.shapes import precompute_stage_shapes, reset_pp_stage_shapes
from am_pipeline.step.shared import duplicate_parameters
from am_pipeline.step.tokens import scale_grads_by_tokens

__version__ = version("am-pipeline")

__all__ = [
    "Action",
    "Costs",
    "CutPlan",
    "Event",
    "ParallelizeFnProtocol",
    "PipelinePlan",
    "PipelineSchedule",
    "StageEstimate",
    "bubble_fraction",
    "build_part",
    "build_pipeline_schedule",
    "calculate_virtual_stages",
    "check_order",
    "duplicate_parameters",
    "gather_timeline",
    "generate_hf_model_fqn_per_model_part",
    "peak_live",
    "pipeline_model",
    "plan_cut",
    "plan_pipeline",
    "plot_timeline",
    "precompute_stage_shapes",
    "read_order",
    "record_timeline",
    "reset_pp_stage_shapes",
    "scale_grads_by_divisor",
    "scale_grads_by_tokens",
    "schedule_order",
    "set_sequence_shards",
    "simulate",
    "split_model_into_stages",
    "stage_ids_this_rank",
    "text_timeline",
]
