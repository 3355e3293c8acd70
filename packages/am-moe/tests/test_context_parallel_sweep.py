"""Causal language models of transformers on two context ranks: exact against one process, or refused by name.

A dozen run always; with `AM_SWEEP=folder` every type does, and leaves there what was measured.
"""

from __future__ import annotations

import json
import os
import pathlib

import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils  # noqa: F401  before ranks are forked: it takes seconds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe.context_parallel import apply_cp, shard_batch, shard_loss, unshard_sequence
from am_testkit.device import device_type
from am_testkit.exact import relative_error
from am_testkit.zoo import NOT_BUILT, logits_of, model_types, runnable, small

SWEEP = os.environ.get("AM_SWEEP")
ALWAYS = ["bloom", "cohere2", "deepseek_v3", "falcon_h1", "gemma3", "gpt2"]
ALWAYS += ["gpt_oss", "llama4_text", "opt", "phi3", "qwen2", "qwen3_moe"]
TYPES = [name for name in model_types() if name not in NOT_BUILT] if SWEEP else ALWAYS
# The reference computes softmax, norms and some routers in float32 even in a float64 model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
# Refused, for what the error of each says.
# fmt: off
REFUSED = {
    "axk2", "bart", "big_bird", "bigbird_pegasus", "blenderbot-small", "blenderbot", "bloom", "blt", "camembert",
    "codegen", "cpmant", "data2vec-text", "deepseek_v32", "deepseek_v4", "doge", "dots3_note_text", "falcon",
    "falcon_mamba", "git", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gptj", "hy_v4",
    "inkling2_text", "inkling_text", "jetmoe", "llama4", "llama4_text", "mamba", "mamba2", "marian", "mbart",
    "megatron-bert", "mllama", "moss_transcribe_diarize", "mpt", "mvp", "openai-gpt", "pegasus", "plbart",
    "prophetnet", "qwen4_exp", "qwen4_exp_text", "reformer", "rembert", "roberta-prelayernorm", "roberta",
    "roformer", "rwkv", "trocr", "whisper", "xglm", "xlm-roberta-xl", "xlm-roberta", "xlm", "xlnet", "xlstm",
    "xmod",
}
# fmt: on


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.ranks(2, timeout=120)
def test_every_model_is_exact_on_two_context_ranks_or_refused(model_type):
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))
    results, tried = {"cp2": 0.0}, set()
    for attention in (None, "eager"):  # None: what transformers takes by itself, sdpa where a type has it
        reference, dtype = runnable(model_type, attention=attention)
        results |= {"dtype": str(dtype).removeprefix("torch."), "kind": type(reference).__name__}
        if model_type in REFUSED:
            with pytest.raises(ValueError, match=r"context parallelism|cannot be cut|more than positions") as refusal:
                apply_cp(reference, mesh)
            record(model_type, results | {"cp2": f"refused: {refusal.value}"})
            return
        if reference.config._attn_implementation in tried:
            continue
        tried.add(reference.config._attn_implementation)
        errors = errors_of(reference, small(model_type, dtype=dtype, attention=attention), mesh)
        worst = max(errors, key=errors.get)
        results["cp2"] = max(results["cp2"], errors[worst])
        record(model_type, results)
        # gemma4's unscaled scores are large, gated delta rules compute in float32.
        loose = model_type.startswith(("gemma4", "qwen3_next", "qwen3_5"))
        tolerance = 1e-4 if loose else TOLERANCE[dtype]
        assert errors[worst] < tolerance, f"{attention}: {worst} is off by {errors[worst]:.1e}"


def errors_of(reference, model, mesh):
    """Relative differences of the logits and of every gradient."""
    ids = torch.randint(3, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    shard = shard_batch({"input_ids": ids, "labels": ids}, mesh)
    expected = logits_of(reference, ids)
    nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    apply_cp(model, mesh)
    logits = logits_of(model, shard["input_ids"], position_ids=shard["position_ids"])
    whole = logits.shape == expected.shape  # what follows the stack needs all tokens
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) if whole else None
    (shard_loss(logits, shard) if loss is None else loss).backward()
    wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    largest = max(g.nan_to_num().abs().max().item() for g in wanted.values())
    gathered = logits if whole else unshard_sequence(logits, mesh)
    errors = {"logits": relative_error(gathered, expected, 0.0, nan_is_nan=True)}
    for name, parameter in model.named_parameters():
        if name in wanted:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            dist.all_reduce(gradient)
            errors[name] = relative_error(gradient / 2, wanted[name], 1e-4 * largest, nan_is_nan=True)
    return errors


def record(model_type, results):
    if SWEEP and dist.get_rank() == 0:
        pathlib.Path(SWEEP, f"context-{model_type}.json").write_text(json.dumps(results))
