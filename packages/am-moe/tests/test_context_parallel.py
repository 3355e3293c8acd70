"""Context parallelism against one process: logits, loss and every gradient, for every type and mask."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils  # noqa: F401  before ranks are forked: it takes seconds
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from am_moe import apply_ep
from am_moe.context_parallel import COMM_TYPES, apply_cp, shard_batch, shard_loss, shard_sequence, unshard_sequence
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, relative_error, whole
from am_testkit.models import tiny, token_batch
from am_testkit.zoo import OLDEST, small

TOKENS = 32
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
SLIDING = {"sliding_window": 6}
# Some ranks' positions stay below the length at which these change.
ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 26}
# Model and settings; what is special about each.
CASES = {
    "llama": {},
    "llama, full": {"is_causal": False},
    "llama, one key head": {"num_key_value_heads": 1, "head_dim": 10},
    "llama, three key heads": {"num_key_value_heads": 3, "num_attention_heads": 12, "head_dim": 6, "hidden_size": 72},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **SLIDING},
    "mistral": {"sliding_window": 17},
    "llama, dynamic rope": {"rope_parameters": ROPE | {"rope_type": "dynamic"}, "max_position_embeddings": 26},
    "llama, longrope": {
        "rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    },
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **SLIDING},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], **SLIDING},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    "qwen3_moe": {},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"], **SLIDING},
    "deepseek_v3": {},  # keys and values of different widths
}
# Their norms multiply by the weight in float32 even in a float64 model.
FLOAT32_NORMS = ("gemma2", "gemma3_text", "cohere2")


def build(case, dtype):
    family = case.split(",")[0]
    if family == "deepseek_v3":
        return small(family, layers=2, dtype=dtype).train()
    model = tiny(family, layers=2, dtype=dtype, **{k: v for k, v in CASES[case].items() if k != "is_causal"})
    if not CASES[case].get("is_causal", True):
        model.config.is_causal = False
    return model


def documents():
    positions = torch.arange(TOKENS)[None].repeat(2, 1)
    positions[0, 11:] -= 11
    positions[1, 5:] -= 5
    positions[1, 21:] -= 16
    return positions


def dense_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    """What every attention function computes, as one matrix, in the dtype of the model throughout."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~attention_mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2), None


def use_dense_attention(model):
    """transformers' own eager attention computes softmax in float32 whatever the model's dtype."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(**settings):
        return sdpa_mask(**settings | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    AttentionInterface.register("dense_reference", dense_attention)
    AttentionMaskInterface.register("dense_reference", mask)
    model.config._attn_implementation = "dense_reference"


def mesh_for(kind):
    ranks = dist.get_world_size()
    if kind == "a2a+p2p":
        return init_device_mesh(device_type(), (ranks // 2, 2), mesh_dim_names=("cp_p2p", "cp_a2a"))
    return init_device_mesh(device_type(), (ranks,), mesh_dim_names=("cp",))


def compare(case, batch, dtype, kinds=COMM_TYPES):
    model = build(case, dtype)
    one = copy.deepcopy(model)
    if dtype is torch.float64 or case == "gpt_oss":
        use_dense_attention(one)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if case == "gpt_oss" and "position_ids" in batch:
        inputs["attention_mask"] = packed_masks(batch["position_ids"])
    expected = one(**inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    wanted = gradients(one)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for kind in kinds:
        label = f"{case}, {kind}, {dtype}, {sorted(batch)}"
        mesh = mesh_for(kind)
        parallel = apply_cp(copy.deepcopy(model), mesh, kind)
        shard = shard_batch(batch, mesh)
        sent = {name: shard[name] for name in ("input_ids", "position_ids", "attention_mask") if name in shard}
        logits = parallel(**sent).logits
        mine = shard_loss(logits, shard)
        mine.backward()
        assert_same(unshard_sequence(logits, mesh)[real], expected[real], TOLERANCE[dtype], f"{label}: logits")
        assert_same(averaged(mine.detach()), loss.detach(), TOLERANCE[dtype], f"{label}: loss")
        actual = {name: averaged(gradient) for name, gradient in gradients(parallel).items()}
        norms = {n: actual.pop(n) for n in list(actual) if case in FLOAT32_NORMS and n.endswith("norm.weight")}
        assert_same(actual, wanted, TOLERANCE[dtype], f"{label}: gradients")
        if norms:
            assert_same(norms, wanted, 1e-5, f"{label}: gradients of norms")


def packed_masks(positions):
    """The masks that keep documents apart; gpt_oss alone does not hand its positions to transformers' mask function."""
    at = torch.arange(TOKENS)
    document = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    full = (document[:, :, None] == document[:, None, :]) & (at[:, None] >= at[None])
    sliding = full & (at[:, None] - at[None] < SLIDING["sliding_window"])
    return {"full_attention": full[:, None], "sliding_attention": sliding[:, None]}


def averaged(tensor):
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def check_case(case, kinds=COMM_TYPES):
    """`kinds` of communication are for one document and for float32; packed rows in float64 are sent in every kind."""
    ids, _ = token_batch(2, TOKENS)
    plain, packed = {"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids, "position_ids": documents()}
    if "rope" in case:  # documents are shorter than what it looks at
        compare(case, plain, torch.float64)
        return
    compare(case, plain, torch.float64, kinds)
    compare(case, packed, torch.float64)
    compare(case, packed, torch.float32, kinds)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(2, timeout=120)
def test_every_type_is_exact_on_two_ranks(case):
    check_case(case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.ranks(4, timeout=240)
def test_every_type_is_exact_on_four_ranks(case):
    check_case(case, COMM_TYPES[list(CASES).index(case) % 2 :: 2])


@pytest.mark.ranks(4, timeout=120)
def test_padding_on_either_side_is_exact_for_the_tokens_that_are_none():
    ids, _ = token_batch(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, 19:] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {
        "input_ids": ids,
        "labels": ids.where(mask.bool(), -100),
        "attention_mask": mask,
        "position_ids": positions,
    }
    batch["labels"][0, 7] = -100  # what the last padding token would predict
    for case in ("llama", "mistral"):
        compare(case, batch, torch.float32)


@pytest.mark.ranks(2, timeout=120)
def test_a_mask_of_ones_keeps_no_documents_apart_as_in_transformers():
    ids, _ = token_batch(2, TOKENS)
    batch = {"input_ids": ids, "labels": ids, "position_ids": documents(), "attention_mask": torch.ones_like(ids)}
    compare("llama", batch, torch.float64, ["p2p"])


@pytest.mark.ranks(2, timeout=120)
def test_the_loss_of_transformers_averages_to_that_of_one_process_and_recomputing_changes_nothing():
    ids, _ = token_batch(2, TOKENS)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.3, -100)
    mesh = mesh_for("p2p")
    for family in ("llama", "mistral", "qwen3_moe"):
        model = build(family, torch.float32).train()
        one, parallel = copy.deepcopy(model), apply_cp(model, mesh)
        parallel.gradient_checkpointing_enable()
        expected = one(input_ids=ids, labels=labels, position_ids=documents(), use_cache=False).loss
        expected.backward()
        loss = parallel(**shard_batch({"input_ids": ids, "labels": labels, "position_ids": documents()}, mesh)).loss
        loss.backward()
        assert_same(averaged(loss.detach()), expected.detach(), 1e-6, "loss")
        actual = {name: averaged(gradient) for name, gradient in gradients(parallel).items()}
        assert_same(actual, gradients(one), 1e-5, family)


@pytest.mark.parametrize("kind", ["p2p", "a2a"])
@pytest.mark.ranks(4, timeout=120)
def test_fsdp_over_the_flattened_data_and_context_axis_trains_like_one_process(kind):
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "cp"))
    flat = mesh[("dp", "cp")]._flatten("dp_cp")
    model = build("qwen3_moe", torch.float64)
    one = copy.deepcopy(model)
    use_dense_attention(one)
    apply_cp(model, mesh["cp"], kind)
    for layer in model.model.layers:
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, one)]
    for step in range(2):
        ids, _ = token_batch(4, TOKENS, seed=step)
        labels = ids.clone()
        labels[0, 5:] = -100  # the data ranks have different numbers of labels
        rows = slice(2 * mesh["dp"].get_local_rank(), 2 * mesh["dp"].get_local_rank() + 2)
        shard = shard_batch({"input_ids": ids[rows], "labels": labels[rows]}, mesh["cp"], flat)
        shard_loss(model(input_ids=shard["input_ids"], position_ids=shard["position_ids"]).logits, shard).backward()
        logits = one(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        assert_same(gradients(model), gradients(one), 1e-9, f"gradients of step {step}")
        for each in (model, one):
            nn.utils.clip_grad_norm_(each.parameters(), 0.1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same({n: whole(p) for n, p in model.named_parameters()}, dict(one.named_parameters()), 1e-8, "weights")


@pytest.mark.ranks(4, timeout=120)
def test_experts_spread_over_data_and_context_ranks_are_exact():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "cp"))
    model = build("qwen3_moe", torch.float64)
    one = copy.deepcopy(model)
    use_dense_attention(one)
    apply_ep(model, init_device_mesh(device_type(), (4,), mesh_dim_names=("ep",)))
    apply_cp(model, mesh["cp"], "a2a")
    ids, _ = token_batch(2, TOKENS)
    row = slice(mesh["dp"].get_local_rank(), mesh["dp"].get_local_rank() + 1)
    shard = shard_batch({"input_ids": ids[row], "labels": ids[row]}, mesh["cp"])
    shard_loss(model(input_ids=shard["input_ids"], position_ids=shard["position_ids"]).logits, shard).backward()
    logits = one(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    actual = {n: g if isinstance(g, DTensor) else averaged(g) for n, g in gradients(model).items()}
    assert_same(actual, gradients(one), 1e-10, "gradients")


class Adapted(nn.Module):
    """Hands its inputs on without naming them and says what it wraps, as peft's models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def get_base_model(self):
        return self.inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.ranks(2, timeout=120)
def test_wrapped_and_compiled_layers_and_half_precision_agree_with_the_model_itself():
    mesh = mesh_for("p2p")
    ids, _ = token_batch(2, TOKENS)
    shard = shard_batch({"input_ids": ids, "position_ids": documents()}, mesh)
    model = build("llama", torch.float32)
    half = copy.deepcopy(model).bfloat16()
    inputs = {"input_ids": ids, "position_ids": documents(), "use_cache": False}
    expected, rounded = model(**inputs).logits, half(**inputs).logits
    wrapped = Adapted(copy.deepcopy(model))
    assert apply_cp(wrapped, mesh) is wrapped
    assert_same(unshard_sequence(wrapped(**shard).logits, mesh), expected, 1e-5, "wrapped")
    apply_cp(model, mesh, "all_gather")
    model.model.layers[0].compile(backend="aot_eager")
    assert_same(unshard_sequence(model(**shard).logits, mesh), expected, 1e-5, "compiled")
    apply_cp(half, mesh)
    logits = unshard_sequence(half(**shard).logits, mesh).float()
    assert relative_error(logits, expected) < 2 * relative_error(rounded.float(), expected)


@pytest.mark.ranks(4)
def test_parts_of_a_tensor_are_dealt_from_both_ends_and_put_together_again():
    for kind in ("p2p", "a2a+p2p"):
        mesh = mesh_for(kind)
        tensor = torch.arange(2 * 16 * 3).view(2, 16, 3)
        part = shard_sequence(tensor, mesh)
        rank = dist.get_rank()
        tokens = [2 * rank, 2 * rank + 1, 14 - 2 * rank, 15 - 2 * rank]
        assert part.equal(tensor[:, tokens])
        assert unshard_sequence(part, mesh).equal(tensor)
        assert unshard_sequence(shard_sequence(tensor.movedim(1, -1), mesh, -1), mesh, -1).equal(tensor.movedim(1, -1))


@pytest.mark.ranks(2)
def test_labels_are_shifted_before_they_are_cut():
    shard = shard_batch({"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}, mesh_for("p2p"))
    assert shard["shift_labels"].tolist() == [[[1, 2, 7, -100], [3, 4, 5, 6]][dist.get_rank()]]
    assert shard["labels"].tolist() == shard["input_ids"].tolist()  # for losses that do not shift
    assert shard["position_ids"].tolist() == [[[0, 1, 6, 7], [2, 3, 4, 5]][dist.get_rank()]]
    assert (shard["num_items_in_batch"].item(), shard["num_labels_in_batch"].item()) == (3.5, 4.0)


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@pytest.mark.ranks(2)
def test_a_loss_divided_by_a_number_that_the_caller_gives_averages_to_that_of_one_process(kind):
    """As under gradient accumulation: the labels of all batches that are added up."""
    model = tiny("llama", layers=1)
    one = copy.deepcopy(model)
    apply_cp(model, mesh_for("p2p"))
    batches = []
    for seed in range(2):
        ids, labels = token_batch(2, 16, seed=seed)
        labels[0, : 3 + 5 * seed] = -100
        batches.append({"input_ids": ids, "labels": labels})
    items = kind(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    for batch in batches:
        batch["num_items_in_batch"] = items
        shard = shard_batch(batch, mesh_for("p2p"))
        loss = model(**shard).loss
        loss.backward()
        assert_same(shard_loss(model(**shard).logits, shard), loss, 1e-6, "shard_loss")
        expected = one(**batch).loss
        expected.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert_same(total / 2, expected, 1e-6, "loss")
    averaged = gradients(model)
    for gradient in averaged.values():
        dist.all_reduce(gradient)
        gradient /= 2
    assert_same(averaged, gradients(one), 1e-6, "gradients")


@pytest.mark.ranks(4)
def test_given_numbers_of_labels_of_data_ranks_are_added_up():
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("dp", "cp"))
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "labels": ids, "num_items_in_batch": [30, 50][mesh.get_local_rank("dp")]}
    shard = shard_batch(batch, mesh["cp"], mesh["dp", "cp"]._flatten("dp_cp"))
    assert shard["num_items_in_batch"].item() == 80 / 4
    assert "num_labels_in_batch" not in shard


@pytest.mark.ranks(2)
def test_a_given_number_of_labels_and_given_shifted_labels_are_kept():
    mesh, ids = mesh_for("p2p"), torch.arange(8)[None]
    row = shard_batch({"input_ids": ids, "labels": torch.tensor([1]), "num_items_in_batch": torch.tensor(3)}, mesh)
    assert row["num_items_in_batch"].item() == 3  # a loss of rows, which every rank computes whole
    shifted = torch.tensor([[1, 2, 3, -100, 5, 6, 7, -100]])  # two documents
    shard = shard_batch({"input_ids": ids, "labels": ids, "shift_labels": shifted}, mesh)
    assert shard["shift_labels"].equal(shard_sequence(shifted, mesh))
    assert shard["num_items_in_batch"].item() == 3


@pytest.mark.ranks(2)
def test_a_loss_over_labels_as_they_are_takes_no_given_number():
    pytest.importorskip("transformers.models.bert.modeling_bert")
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=64, **sizes)).eval()
    apply_cp(model, mesh_for("p2p"))
    ids = torch.arange(16)[None]
    with pytest.raises(ValueError, match="losses over labels; count them with shard_batch"):
        model(**shard_batch({"input_ids": ids, "labels": ids, "num_items_in_batch": 60}, mesh_for("p2p")))


@pytest.mark.ranks(2)
def test_the_model_keeps_its_names_and_can_be_copied_and_other_models_keep_their_attention():
    model, other = tiny("llama", layers=1), tiny("llama", layers=1)
    names, config = set(model.state_dict()), model.config.to_dict()
    apply_cp(model, mesh_for("p2p"))
    assert set(model.state_dict()) == names
    assert model.config.to_dict() == config
    assert other.config._attn_implementation == "eager"
    shard = shard_batch({"input_ids": token_batch(1, 8)[0]}, mesh_for("p2p"))
    assert copy.deepcopy(model)(**shard).logits.equal(model(**shard).logits)


def bad_batches():
    ids = torch.ones(2, 8, dtype=torch.int64)
    return [
        ({"input_ids": ids[:, :6]}, "6 tokens does not divide into 2 x 2 chunks.*cut it to 4 or pad it to 8"),
        ({"labels": ids}, "needs input_ids"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 8, 8)}, "'attention_mask'.*cannot be cut"),
        ({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 4, 8])}, "'cu_seq_lens_q'.*packed by position_ids"),
    ]


@pytest.mark.ranks(2)
def test_bad_requests_are_refused_with_what_would_do():
    mesh = init_device_mesh(device_type(), (2,), mesh_dim_names=("cp",))
    plane = init_device_mesh(device_type(), (2, 1), mesh_dim_names=("dp", "cp"))
    for batch, message in bad_batches():
        with pytest.raises(ValueError, match=message):
            shard_batch(batch, mesh)
    for arguments, message in (
        ((mesh, "ring"), "cp_comm_type must be one of p2p, all_gather, a2a, a2a.p2p; got 'ring'"),
        ((plane, "p2p"), r"needs a cp_mesh of 1 axes, got 2; pass an axis of it such as mesh\['cp'\]"),
        ((DeviceMesh(device_type(), [1, 0]), "p2p"), "ascending order.*1, 0"),
        ((mesh, "a2a+p2p"), "needs a cp_mesh of 2 axes, got 1; pass init_device_mesh"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_cp(tiny("llama", layers=1), *arguments)
    odd = tiny("llama", layers=1, num_attention_heads=3, num_key_value_heads=3, hidden_size=24)
    with pytest.raises(ValueError, match=r"3 attention heads of LlamaForCausalLM do not divide over 2 ranks.*\[1, 3\]"):
        apply_cp(odd, mesh, "a2a")
    model = apply_cp(tiny("llama", layers=1), mesh)
    with pytest.raises(ValueError, match="context-parallel already"):
        apply_cp(model, mesh)
    ids = torch.ones(1, 8, dtype=torch.int64)
    positions = torch.arange(8)[None]
    for inputs, message in (
        ({"input_ids": ids}, "needs position_ids"),
        ({"input_ids": ids, "position_ids": positions, "use_cache": True}, "for training"),
        ({"input_ids": ids[:, :7], "position_ids": positions[:, :7]}, "even number of tokens"),
        (
            {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones(1, 1, 8, 8)},
            "attention_mask must",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    with pytest.raises(ValueError, match="call the LlamaForCausalLM that apply_cp was given"):
        model.model(input_ids=ids, position_ids=positions)
    dropping = apply_cp(tiny("llama", layers=1, attention_dropout=0.1).train(), mesh)
    with pytest.raises(ValueError, match=r"attention dropout 0\.1"):
        dropping(input_ids=ids, position_ids=positions)


REFUSED = {
    "mamba": "no attention that looks its function up",
    "bloom": "no attention that looks its function up",
    "llama4_text": "layers of type chunked_attention",
    "inkling_text": "layers of type hybrid_sliding",
    "deepseek_v32": "layers of type " + ("deepseek_sparse_attention" if OLDEST else "indexed_attention"),
    "git": r"GitAttention\) computes attention by itself",
    "camembert": "counts positions from its padding token's id",
    "blt": "attends to another sequence",
    "bart": "takes no position_ids",
}


@pytest.mark.ranks(2, timeout=120)
def test_models_whose_tokens_meet_elsewhere_are_refused_by_name():
    for family, reason in REFUSED.items():
        model = small(family, layers=4, dtype=torch.float32)
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=f"{type(model).__name__}.*{reason}"):
            apply_cp(model, mesh_for("p2p"))
        assert model.config._attn_implementation == before


@pytest.mark.ranks(2)
def test_a_mask_under_which_a_token_sees_none_is_refused_where_a_layer_has_it():
    unused = small("qwen2_moe", layers=2)
    assert unused.config.sliding_window == 0  # its mask is made, and no layer has it
    apply_cp(unused, mesh_for("p2p"))
    used = small("qwen2", layers=2, sliding_window=4, layer_types=["sliding_attention"] * 2)
    used.config.sliding_window = 0
    with pytest.raises(ValueError, match=r"Qwen2.*a token sees none, nor itself"):
        apply_cp(used, mesh_for("p2p"))


class DotProductAttention(nn.Module):
    """Has the method that Transformer Engine documents for its class of this name."""

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type="p2p"):
        self.given = cp_group, cp_global_ranks, cp_stream, cp_comm_type


@pytest.mark.ranks(4)
def test_attention_of_transformer_engine_is_given_its_group():
    line, plane = mesh_for("p2p"), mesh_for("a2a+p2p")
    model = nn.ModuleDict({"attention": DotProductAttention()})
    apply_cp(model, line, "all_gather")
    group, ranks, stream, kind = model["attention"].given
    assert (group, ranks, kind) == (line.get_group(), [0, 1, 2, 3], "all_gather")
    assert isinstance(stream, torch.cpu.Stream)
    apply_cp(model, plane, "a2a+p2p")
    groups, ranks, _, kind = model["attention"].given
    assert groups == [plane.get_group("cp_a2a"), plane.get_group("cp_p2p")]
    assert (ranks, kind) == ([0, 1, 2, 3], "a2a+p2p")
