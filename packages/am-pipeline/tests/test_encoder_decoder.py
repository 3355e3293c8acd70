"""An encoder and a decoder are two stacks of one pipeline: lengths, tied weights, dropout, FSDP2, stages by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.models.bart.modeling_bart
import transformers.models.t5.modeling_t5
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from am_pipeline import build_part, duplicate_parameters, pipeline_model, plan_cut
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients
from am_testkit.models import next_token_loss

IDS, LABELS = "decoder_input_ids", "labels"


def small(family="t5", encoder=2, decoder=2, dropout=0.0, **settings):
    sizes = {"vocab_size": 96, "d_model": 32, "attn_implementation": "eager", "pad_token_id": 0}
    if family == "t5":
        sizes |= {"d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": encoder, "num_decoder_layers": decoder}
        sizes |= {"dropout_rate": dropout}
    else:
        sizes |= {"encoder_layers": encoder, "decoder_layers": decoder, "dropout": dropout, "attention_dropout": 0.0}
        sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48)
    config = transformers.AutoConfig.for_model(family, **sizes | settings)
    torch.manual_seed(0)
    return transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float64)


def batch_of(rows, length, decoder, seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    ids, answer = (torch.randint(3, 96, (rows, n), generator=generator) for n in (length, decoder + 1))
    batch = {"input_ids": ids, IDS: answer[:, :-1].contiguous(), LABELS: answer[:, 1:].contiguous()}
    if padded:
        batch["attention_mask"] = (torch.arange(length) < length - 3 * (torch.arange(rows) % 2)[:, None]).long()
    return batch


def one_process(model, batch):
    inputs = {name: value for name, value in batch.items() if name != LABELS}
    logits = model(**inputs, use_cache=False).logits
    return logits, next_token_loss(logits, batch[LABELS])


def build(model, schedule, mesh=None, batch=4, **settings):
    mesh = mesh or init_device_mesh(device_type(), (dist.get_world_size(),), mesh_dim_names=("pp",))
    given = {"microbatch_size": 1, "local_batch_size": batch, "loss_fn": next_token_loss, "scale_grads": True}
    return pipeline_model(model, mesh, pipeline_parallel_schedule=schedule, **given | settings)


def call(built, batch, word="step"):
    schedule, _, first, last, _ = built
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", LABELS)} if first else {}
    losses: list = []
    ids = (batch["input_ids"],) if first else ()
    logits = getattr(schedule, word)(*ids, target=batch[LABELS] if last else None, losses=losses, **inputs)
    return logits, torch.stack(losses).mean() if last else None


def without_key_biases(tensors):
    """Their gradient is zero but for rounding, which AdamW makes steps of."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("k_proj.bias")}


def shard(part, world_mesh, moe_mesh, **axes):
    for layer in (*part.encoder.block, *part.decoder.block):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=world_mesh["dp"])
    fully_shard(part, mesh=world_mesh["dp"])


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.ranks(3, timeout=180)
def test_three_clipped_steps_of_other_lengths_equal_one_process_with_weights_tied_in_three_places(schedule):
    model = small(encoder=3, decoder=3) if schedule == "1F1B" else small("bart", encoder=2, decoder=4)
    whole = copy.deepcopy(model)
    built = build(model, schedule, seq_len=12 if schedule == "1F1B" else None)
    plan, part = built[4][0].plan, built[1][0]
    assert len(plan.shared) == 1
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (part, whole)]
    twins = {id(p) for p in duplicate_parameters(built[4])}
    for step, lengths in enumerate(((12, 7), (9, 14), (11, 11))):
        batch = batch_of(4, *lengths, seed=step, padded=step == 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        logits, loss = call(built, batch)
        expected, expected_loss = one_process(whole, batch)
        expected_loss.backward()
        if built[3]:
            assert_same(logits, expected, 1e-12, f"logits of step {step}")
            assert_same(loss, expected_loss, 1e-12, f"loss of step {step}")
        squares = sum(p.grad.square().sum() for p in part.parameters() if id(p) not in twins)
        dist.all_reduce(squares)
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        assert_same(squares.sqrt(), norm, 1e-10, f"norm of step {step}")
        for p in part.parameters():
            p.grad.mul_(0.1 / (squares.sqrt() + 1e-6))
        for optimizer in optimizers:
            optimizer.step()
    weights = dict(whole.named_parameters(remove_duplicate=False))
    assert_same(without_key_biases(dict(part.named_parameters())), weights, 1e-9, "weights")


@pytest.mark.parametrize(("schedule", "family"), [("Interleaved1F1B", "bart"), ("ZBVZeroBubble", "t5")])
@pytest.mark.ranks(2, timeout=180)
def test_four_stages_on_two_ranks_train_and_evaluate_like_one_process(schedule, family):
    model = small(family)
    whole = copy.deepcopy(model)
    built = build(model, schedule)
    batches = [batch_of(4, 10, 6, padded=True), batch_of(4, 8, 13, seed=1), batch_of(4, 10, 6, seed=2, padded=True)]
    for batch, word in zip(batches, ("step", "eval", "step"), strict=True):
        logits, loss = call(built, batch, word)
        expected, expected_loss = one_process(whole, batch)
        if word == "step":
            expected_loss.backward()
        if built[3]:
            assert_same(logits, expected, 1e-12, f"logits of {word}")
            assert_same(loss, expected_loss, 1e-12, f"loss of {word}")
    for part in built[1]:
        assert_same(without_key_biases(gradients(part)), gradients(whole), 1e-10, "gradients")


@pytest.mark.ranks(4, timeout=180)
def test_fsdp_inside_the_stages_of_both_stacks_equals_one_process():
    model = small()
    whole = copy.deepcopy(model)
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "dp"))
    built = build(model, "1F1B", mesh, dp_axis_names=("dp",), parallelize_fn=shard)
    for step in range(2):
        batch = batch_of(8, 9 + step, 7, seed=step)
        rows = slice(4 * mesh.get_local_rank("dp"), 4 * mesh.get_local_rank("dp") + 4)
        call(built, {name: value[rows] for name, value in batch.items()})
        one_process(whole, batch)[1].backward()
    found = {n: p.grad.full_tensor() for n, p in built[1][0].named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in whole.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert_same(found, {n: wanted[n] for n in found}, 1e-10, "gradients")


@pytest.mark.ranks(2, timeout=180)
def test_what_cannot_be_is_refused_on_every_rank_and_the_next_step_runs():
    built = build(small(), "1F1B")
    batch = batch_of(4, 8, 6)
    schedule, _, first, last, _ = built
    ids, target = ((batch["input_ids"],) if first else ()), batch[LABELS] if last else None
    with pytest.raises(ValueError, match="give the labels as target="):
        schedule.step(*ids, target=target, **{IDS: batch[IDS], LABELS: batch[LABELS]})
    lengths = [torch.ones(1, 6 - place, dtype=torch.int64) for place in range(4)]
    with pytest.raises(ValueError, match="decoder_input_ids of one length"):
        schedule.step(*ids, target=target, **{IDS: lengths})
    with pytest.raises(ValueError, match="cannot be called with input_ids"):
        schedule.step(*ids, target=target)
    call(built, batch)


def test_the_plan_shows_both_stacks_and_where_what_runs_between_them_is():
    plan = plan_cut(small("bart", encoder=3, decoder=3), 3, balance="layers")
    assert str(plan).splitlines()[1].startswith("stage 1  model.encoder.layers.2-2 model.decoder.layers.0-0")
    assert "model.decoder.embed_positions" in plan.stages[1]
    assert plan.layers_of(1) == range(2, 4)
    assert [len(group.copies) for group in plan.shared] == [3]
    assert not plan.needs_first_input
    plan = plan_cut(small().eval(), 4)
    assert "encoder.final_layer_norm" in plan.stages[1]
    assert {str(c.shape) for c in plan.passages[3].receives} == {
        "(batch, sequence, 32)",
        "(batch, decoder sequence, 32)",
        "(1, 4, decoder sequence, decoder sequence)",
        "(1, 4, decoder sequence, sequence)",
    }


BY_HAND = {
    "a cut in each stack": [
        ["encoder.embed_tokens", "encoder.block.0"],
        ["encoder.block.1", "encoder.final_layer_norm", "decoder.block.0", "decoder.embed_tokens"],
        ["decoder.block.1", "decoder.final_layer_norm", "lm_head"],
    ],
    "the encoder in the first stage": [
        ["encoder.embed_tokens", "encoder.block.0", "encoder.block.1", "encoder.final_layer_norm"],
        ["decoder.embed_tokens", "decoder.block.0", "decoder.block.1", "decoder.final_layer_norm", "lm_head"],
    ],
    "the decoder's embedding a stage early": [
        ["encoder.embed_tokens", "encoder.block.0", "encoder.block.1", "decoder.embed_tokens"],
        ["encoder.final_layer_norm", "decoder.block.0", "decoder.block.1", "decoder.final_layer_norm", "lm_head"],
    ],
    "the encoder as one module": [
        ["encoder", "decoder.embed_tokens", "decoder.block.0"],
        ["decoder.block.1", "decoder.final_layer_norm", "lm_head"],
    ],
}


@pytest.mark.parametrize("stages", BY_HAND.values(), ids=BY_HAND)
def test_parts_of_stages_named_by_hand_equal_the_whole_model(stages):
    model = small().eval()
    whole = copy.deepcopy(model)
    plan = plan_cut(model, module_names_per_stage=stages)
    for lengths in ((10, 6), (7, 9)):
        batch = batch_of(3, *lengths, padded=True)
        expected, loss = one_process(whole, batch)
        loss.backward()
        sent = (batch["input_ids"],)
        inputs = {name: value for name, value in batch.items() if name not in ("input_ids", LABELS)}
        for stage in range(len(stages)):
            output = build_part(model, plan, stage)[0](*sent, **inputs)
            sent = output if isinstance(output, tuple) else (output,)
        next_token_loss(output, batch[LABELS]).backward()
        assert_same(output, expected, 1e-12, "logits")
    assert_same(gradients(model), gradients(whole), 1e-10, "gradients")


def test_what_a_dropout_after_the_encoder_leaves_is_drawn_once_and_travels():
    model = small(decoder=3, dropout=0.5).train()
    plan = plan_cut(model, 4)
    travels = {str(c.value) for c in plan.traveling}
    assert "what encoder.dropout returns (call 2)" in travels
    batch = batch_of(2, 8, 6)
    sent, kept = (batch["input_ids"],), []
    for stage in range(3):
        part = build_part(model, plan, stage)[0]
        sent = part(*sent, **{IDS: batch[IDS]})
        sent = sent if isinstance(sent, tuple) else (sent,)
        values = [str(c.value) for c in plan.passages[stage].sends]
        kept += [sent[i] for i, name in enumerate(values) if name == "what encoder.dropout returns (call 2)"]
    assert len(kept) > 1
    assert all(torch.equal(one, kept[0]) for one in kept)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden, memory=None):
        memory = 0 if memory is None else memory.mean(1, keepdim=True)
        return hidden + self.linear(hidden + memory).tanh()


class Translator(nn.Module):
    """An encoder and a decoder of no library; `run` is its forward, decoder first in the order of registration."""

    def __init__(self, run):
        super().__init__()
        self.later = nn.ModuleList(Layer() for _ in range(2))
        self.embed, self.norm, self.head = nn.Embedding(96, 8), nn.LayerNorm(8), nn.Linear(8, 96)
        self.earlier = nn.ModuleList(Layer() for _ in range(2))
        self.run = run

    def forward(self, input_ids, decoder_input_ids):
        return self.run(self, input_ids, decoder_input_ids)


def translate(model, ids, answer):
    memory = model.embed(ids)
    for layer in model.earlier:
        memory = layer(memory)
    memory = model.norm(memory)
    hidden = model.embed(answer)
    for layer in model.later:
        hidden = layer(hidden, memory)
    return model.head(model.norm(hidden))


def turned_around(model, ids, answer):
    """The decoder's first layer runs before the encoder's last."""
    memory = model.earlier[0](model.embed(ids))
    hidden = model.later[0](model.embed(answer), memory)
    memory = model.earlier[1](memory)
    return model.head(model.later[1](hidden, memory))


def decides_by_the_decoder(model, ids, answer):
    """Whether the norm runs depends on a number in the decoder's ids."""
    logits = translate(model, ids, answer)
    return logits if answer[0, 0] < 5 else model.norm(model.embed(ids)).mean() + logits


def test_features_do_not_hide_that_a_decoder_decides_by_its_ids():
    def listen(model, features, answer):
        memory = model.earlier[1](model.earlier[0](features))
        hidden = model.later[1](model.later[0](model.embed(answer), memory))
        return model.head(hidden if answer[0, 0] < 5 else model.norm(hidden))

    example = {"input_ids": torch.randn(2, 5, 8), IDS: torch.ones(2, 9, dtype=torch.int64)}
    with pytest.raises(ValueError, match="decides by the numbers in its inputs"):
        plan_cut(Translator(listen), 2, example_inputs=example)


def test_stacks_of_no_library_are_found_in_the_order_in_which_they_run():
    torch.manual_seed(0)
    model = Translator(translate).double()
    plan = plan_cut(model, 4, balance="layers")
    assert plan.anatomy.stacks == ("earlier", "later")
    assert plan.stages[1][0] == "earlier.1"
    batch = batch_of(2, 5, 9)
    sent = (batch["input_ids"],)
    for stage in range(4):
        ids = {"input_ids": batch["input_ids"]} if stage else {}
        output = build_part(model, plan, stage)[0](*sent, decoder_input_ids=batch[IDS], **ids)
        sent = output if isinstance(output, tuple) else (output,)
    assert_same(output, model(batch["input_ids"], batch[IDS]), 1e-12, "logits")


@pytest.mark.parametrize(
    ("run", "stages", "why"),
    [
        (turned_around, [["earlier.0", "earlier.1", "embed"], ["later.0", "later.1", "norm", "head"]], None),
        (turned_around, [["earlier.0", "embed"], ["earlier.1", "later.0", "later.1", "norm", "head"]], None),
        (turned_around, [["later.0", "embed", "earlier.0"], ["earlier.1", "later.1", "norm", "head"]], None),
        (translate, [["later.0", "later.1", "embed", "norm", "head"], ["earlier.0", "earlier.1"]], "in order"),
        (decides_by_the_decoder, None, "decides by the numbers in its inputs"),
    ],
)
def test_stacks_that_do_not_run_one_after_the_other_are_cut_only_where_it_is_exact(run, stages, why):
    torch.manual_seed(0)
    model = Translator(run).double()
    if why:
        with pytest.raises(ValueError, match=why):
            plan_cut(model, None if stages else 2, module_names_per_stage=stages)
        return
    plan = plan_cut(model, module_names_per_stage=stages)
    batch = batch_of(2, 5, 9)
    sent = (batch["input_ids"],)
    for stage in range(len(stages)):
        output = build_part(model, plan, stage)[0](*sent, decoder_input_ids=batch[IDS])
        sent = output if isinstance(output, tuple) else (output,)
    assert_same(output, model(batch["input_ids"], batch[IDS]), 1e-12, "logits")
