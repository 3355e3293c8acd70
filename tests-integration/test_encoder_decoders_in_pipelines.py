"""An encoder-decoder over pipeline and tensor ranks that shard the sequence, like one process."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import am_pipeline
import am_tp_plans
from am_testkit.device import device_type
from am_testkit.exact import assert_same
from am_testkit.heads import inputs_for, small_for
from am_testkit.models import next_token_loss


@pytest.mark.parametrize("model_type", ["bart", "t5"])  # without a final norm of the encoder, and with one
@pytest.mark.ranks(4, timeout=240)
def test_what_an_encoder_hands_on_is_whole_whatever_returns_it(model_type):
    model, whole = (small_for("translation", model_type, torch.float64) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    plan = am_tp_plans.resolve_plan(
        model, infer=True, sequence_parallel=True, example_inputs=inputs_for(model, "translation", 2)
    )
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "tp"))

    def over_tensor_ranks(part, world_mesh, moe_mesh, **axes):
        return am_tp_plans.apply_plan(part, world_mesh["tp"], plan)

    schedule, parts, first, last, _ = am_pipeline.pipeline_model(
        model, mesh, tp_axis_name="tp", microbatch_size=1, local_batch_size=2, loss_fn=next_token_loss,
        parallelize_fn=over_tensor_ranks,
    )  # fmt: skip
    for seed in range(2):
        batch = inputs_for(whole, "translation", 2, seed=seed)
        names = list(batch)
        labels = torch.randint(3, 20, batch["decoder_input_ids"].shape, generator=torch.Generator().manual_seed(seed))
        rest = {name: batch[name] for name in names[1:]}
        schedule.step(
            *((batch[names[0]],) if first else ()), target=labels if last else None, **(rest if first else {})
        )
        for row in range(2):
            one = {name: value[row : row + 1] for name, value in batch.items()}
            next_token_loss(whole(**one, use_cache=False).logits, labels[row : row + 1]).backward()
    found = {n: p.grad for part in parts for n, p in part.named_parameters() if p.grad is not None}
    found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in found.items()}
    wanted = {n: p.grad for n, p in whole.named_parameters(remove_duplicate=False) if p.grad is not None}
    largest = max(g.abs().max().item() for g in wanted.values())
    small = {n for n, g in wanted.items() if g.abs().max() < 1e-9 * largest}
    assert_same({n: g for n, g in found.items() if n not in small}, wanted, 1e-9, model_type)
