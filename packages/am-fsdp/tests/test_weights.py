"""Folders of Hugging Face weights and models on meshes, against transformers in one process."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import am_fsdp.weights.hf_folder
from am_fsdp import clip_grad_norm_, fsdp2_strategy_parallelize, load_hf_weights, save_hf_weights
from am_fsdp.ledger import Ledger
from am_testkit.device import device_type
from am_testkit.exact import assert_same, gradients, whole
from am_testkit.models import next_token_loss, tiny, token_batch
from am_testkit.zoo import small

MESHES = {"dp2": (2,), "dp4": (4,), "tp2": (1, 2), "dp2tp2": (2, 2), "dp2tp4": (2, 4), "hsdp2x2": (2, 2)}
AXES = ("data_parallel", "tensor_parallel")
HYBRID = ("replicas", "shards")


def made(family, **overrides):
    if family in ("llama", "qwen3", "qwen3_moe", "mixtral"):
        return tiny(family, tied=family == "qwen3", **overrides)
    return small(family, **overrides)


def on_meta(model):
    """The same model without weights, as `from_config` under the meta device makes it."""
    with torch.device("meta"):
        return type(model)._from_config(model.config, dtype=model.dtype).train(model.training)


def laid_out(model, mesh, **how):
    hybrid = mesh == "hsdp2x2"
    names = HYBRID if hybrid else AXES[: len(MESHES[mesh])]
    axes = init_device_mesh(device_type(), MESHES[mesh], mesh_dim_names=names)
    return fsdp2_strategy_parallelize(model, axes, model.dtype, dp_mesh_name=HYBRID if hybrid else AXES[0], **how)


def from_pretrained(model, folder, **how):
    loaded = type(model).from_pretrained(folder, attn_implementation="eager", **how)
    if hasattr(loaded.config, "_experts_implementation"):
        loaded.config._experts_implementation = "eager"
    return loaded


def shared(path):
    """The path of rank 0, on every rank."""
    paths = [str(path)]
    dist.broadcast_object_list(paths, src=0)
    return paths[0]


def saved_by_transformers(model, path, **how):
    folder = shared(path)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, **how)
    dist.barrier()
    return folder


def assert_equal(model, expected, tolerance=1e-12):
    """Every tensor, persistent or not, bitwise; logits as near as shards add up."""
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, expected))
        assert set(mine) == set(theirs)
        assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in theirs.items()}
        for name, tensor in mine.items():
            assert whole(tensor).equal(theirs[name]), name
    ids = token_batch(2, 8, vocab_size=60)[0]
    with torch.no_grad():
        assert_same(model(ids, use_cache=False).logits, expected(ids, use_cache=False).logits, tolerance, "logits")


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("llama", "dp2"),
        ("llama", "tp2"),
        ("qwen3", "dp2"),
        ("qwen3", "tp2"),
        ("qwen3_moe", "dp2"),
        ("qwen3_moe", "tp2"),
        ("mixtral", "dp2"),
        ("mixtral", "tp2"),
        ("deepseek_v3", "dp2"),
        ("gpt_oss", "dp2"),
        ("gpt2", "dp2"),
        ("falcon_h1", "dp2"),
    ],
)
@pytest.mark.ranks(2)
def test_a_folder_is_read_into_the_shards_of_a_model_on_meta(tmp_path, family, mesh):
    read_into_shards(tmp_path, made(family), mesh)


@pytest.mark.parametrize("mesh", ["dp4", "dp2tp2", "hsdp2x2"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.ranks(4)
def test_a_folder_is_read_into_the_shards_of_four_ranks(tmp_path, family, mesh):
    read_into_shards(tmp_path, made(family), mesh)


@pytest.mark.parametrize("mesh", ["dp4", "dp2tp2"])
@pytest.mark.ranks(4)
def test_shards_that_do_not_divide_are_read_and_written(tmp_path, mesh):
    model = tiny("llama", intermediate_size=50, hidden_size=36, vocab_size=98)
    read_into_shards(tmp_path, model, mesh)
    save_and_compare(tmp_path, laid_out(model, mesh), from_pretrained(model, shared(tmp_path / "hf")))


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
@pytest.mark.ranks(8, timeout=120)
def test_key_value_heads_that_ranks_share_are_read_and_written(tmp_path, family):
    model = made(family)
    read_into_shards(tmp_path, model, "dp2tp4")
    save_and_compare(tmp_path, laid_out(model, "dp2tp4"), from_pretrained(model, shared(tmp_path / "hf")))


def read_into_shards(tmp_path, model, mesh):
    folder = saved_by_transformers(model, tmp_path / "hf", max_shard_size="20KB")
    loaded = laid_out(on_meta(model), mesh)
    held = {id(p) for p in loaded.parameters()}
    assert load_hf_weights(loaded, folder) is loaded
    assert {id(p) for p in loaded.parameters()} == held, "an optimizer made before still has them"
    expected = from_pretrained(model, folder)
    local = sum(whole_or_local(p).numel() for p in loaded.parameters())
    assert local < 0.6 * sum(p.numel() for p in expected.parameters()) or mesh == "tp2"
    assert_equal(loaded, expected)


def whole_or_local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_and_compare(tmp_path, model, expected):
    folder = shared(tmp_path / "saved")
    save_hf_weights(model, folder, max_shard_size="20KB")
    assert_equal(model, from_pretrained(expected, folder))
    assert_equal(from_pretrained(expected, folder), expected, 0.0)


@pytest.mark.ranks(2)
def test_a_real_model_is_filled_in_place_even_while_it_is_unsharded(tmp_path):
    folder = saved_by_transformers(tiny("qwen3", tied=True), tmp_path / "hf")
    model = laid_out(tiny("qwen3", tied=True, seed=5), "dp2")
    model(token_batch(1, 8)[0])  # leaves the root whole
    assert not all(isinstance(p, DTensor) for p in model.parameters())
    load_hf_weights(model, folder)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_equal(model, from_pretrained(tiny("qwen3", tied=True), folder))


@pytest.mark.ranks(2)
def test_tensors_take_the_dtype_of_the_model_as_they_are_read_and_one_of_choice_as_they_are_written(tmp_path):
    source = tiny("qwen3_moe", dtype=torch.bfloat16)
    folder = saved_by_transformers(source, tmp_path / "hf")
    model = laid_out(on_meta(tiny("qwen3_moe", dtype=torch.float32)), "dp2")
    load_hf_weights(model, folder)
    assert_equal(model, from_pretrained(source, folder, dtype=torch.float32), 1e-5)
    back = shared(tmp_path / "back")
    save_hf_weights(model, back, dtype=torch.bfloat16)
    again = type(source).from_pretrained(back)
    assert again.dtype == torch.bfloat16
    assert all(again.get_parameter(name).equal(p) for name, p in source.named_parameters())


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [("qwen3", "dp2tp2", "dp4"), ("qwen3_moe", "hsdp2x2", "dp2tp2"), ("llama", "dp4", "hsdp2x2")],
)
@pytest.mark.ranks(4, timeout=120)
def test_a_model_trains_is_saved_and_trains_on_under_another_mesh_as_in_one_process(tmp_path, family, first, second):
    single = made(family)
    folder = saved_by_transformers(single, tmp_path / "hf", max_shard_size="20KB")
    for step, mesh in enumerate((first, second)):
        model = laid_out(on_meta(single), mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        load_hf_weights(model, folder)
        train(model, optimizer, step, mesh)
        reference = torch.optim.SGD(single.parameters(), lr=0.1)
        reference.zero_grad()
        train(single, reference, step, None)
        assert_same(gradients(model), gradients(single), 1e-10, "gradients")
        folder = shared(tmp_path / f"saved{step}")
        save_hf_weights(model, folder, max_shard_size="20KB")
        loaded = from_pretrained(single, folder)
        assert_same(dict(loaded.named_parameters()), dict(single.named_parameters()), 1e-10, "weights")
        assert_equal(model, loaded)


def train(model, optimizer, step, mesh):
    ids, labels = token_batch(4, 8, seed=step)
    if mesh is not None:
        parts = 2 if mesh == "dp2tp2" else 4
        part = dist.get_rank() // (4 // parts)
        ids, labels = (t.chunk(parts)[part] for t in (ids, labels))
    next_token_loss(whole(model(ids).logits), labels).backward()
    clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


@pytest.mark.ranks(2)
def test_parameters_offloaded_to_the_cpu_train_after_they_were_read(tmp_path):
    single = tiny("llama")
    folder = saved_by_transformers(single, tmp_path / "hf")
    model = laid_out(on_meta(single), "dp2", cpu_offload=True)
    load_hf_weights(model, folder, device=device_type())
    ids, labels = token_batch(2, 8)
    for one, batch in ((single, slice(0, 2)), (model, slice(dist.get_rank(), dist.get_rank() + 1))):
        next_token_loss(one(ids[batch]).logits, labels[batch]).backward()
    assert_same(gradients(model), gradients(single), 1e-10)


@pytest.mark.parametrize("kept", [(0, 2), (2, 4)])
@pytest.mark.ranks(2)
def test_a_pipeline_part_reads_its_layers_alone(tmp_path, kept):
    """A part has modules without parameters in place of what other stages hold; the head is tied to an embedding."""
    single = tiny("qwen3", tied=True)
    folder = saved_by_transformers(single, tmp_path / "hf", max_shard_size="20KB")
    part = on_meta(single)
    for index in {0, 1, 2, 3} - set(range(*kept)):
        part.model.layers[index] = nn.Identity()
    if kept[0] > 0:
        part.model.embed_tokens = nn.Identity()
    laid_out(part, "dp2")
    with pytest.raises(ValueError, match=r"the model has no model.layers.\d.*"):
        load_hf_weights(part, folder)
    load_hf_weights(part, folder, strict=False)
    assert any(n.startswith("lm_head") for n in dict(part.named_parameters(remove_duplicate=False)))
    expected = dict(single.named_parameters(remove_duplicate=False))
    for name, parameter in part.named_parameters(remove_duplicate=False):
        assert whole(parameter).equal(expected[name]), name


@pytest.mark.ranks(4)
def test_a_rank_reads_the_experts_that_it_owns_and_no_others(tmp_path, monkeypatch):
    single = tiny("qwen3_moe", layers=2)
    folder = saved_by_transformers(single, tmp_path / "hf")
    mesh = init_device_mesh(device_type(), (4,), mesh_dim_names=("ep",))
    model = on_meta(single)
    for module in model.modules():
        for name in ("gate_up_proj", "down_proj"):
            parameter = vars(module)["_parameters"].get(name)
            if parameter is not None:
                setattr(module, name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
    read = count_reads(monkeypatch)
    load_hf_weights(model, folder)
    for name, parameter in model.named_parameters():
        assert whole(parameter).equal(single.get_parameter(name)), name
    rank = dist.get_rank()
    owned = {f"model.layers.{layer}.mlp.experts.{e}." for layer in (0, 1) for e in (2 * rank, 2 * rank + 1)}
    experts = [key for key in read if ".experts." in key]
    assert {key.rsplit(".", 2)[0] + "." for key in experts} == owned
    assert len(experts) == len(set(experts)) == 2 * 2 * 3


def count_reads(monkeypatch):
    """The keys of a folder that are read, in order."""
    read = []
    describe = am_fsdp.weights.hf_folder.HFFolder._tensor

    def described(self, file, key):
        lazy = describe(self, file, key)
        inner = lazy.read_into
        lazy.read_into = lambda out, box: (read.append(key), inner(out, box))
        return lazy

    monkeypatch.setattr(am_fsdp.weights.hf_folder.HFFolder, "_tensor", described)
    return read


@pytest.mark.ranks(2)
def test_ranks_with_different_models_are_told_apart_before_anything_is_written(tmp_path):
    model = tiny("llama", layers=1 + dist.get_rank())
    folder = shared(tmp_path / "hf")
    with pytest.raises(ValueError, match="the ranks of the group hold different tensors of LlamaForCausalLM"):
        save_hf_weights(model, folder)
    one = dist.new_group([0])
    dist.new_group([1])
    if dist.get_rank() == 0:
        save_hf_weights(model, folder, group=one)
        assert_equal(from_pretrained(model, folder), model, 0.0)
    else:
        with pytest.raises(ValueError, match="this rank is not in group"):
            save_hf_weights(model, folder, group=one)


@pytest.mark.ranks(2)
def test_what_one_rank_finds_wrong_every_rank_raises(tmp_path):
    model = laid_out(tiny("llama", layers=2), "dp2")
    folder = tmp_path / "hf"
    if dist.get_rank() == 1:
        folder.mkdir()
        (folder / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds weights already"):
        save_hf_weights(model, folder)
    blocked = shared(tmp_path / "file")
    if dist.get_rank() == 0:
        open(blocked, "w").close()
    dist.barrier()
    with pytest.raises(OSError, match="file"):
        save_hf_weights(model, f"{blocked}/hf")


@pytest.fixture
def folder(tmp_path):
    tiny("llama", layers=1).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    return tmp_path / "hf"


def index_of(folder):
    return folder / "model.safetensors.index.json"


def edited(folder, change):
    """The folder as one file, its tensors changed."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    index_of(folder).unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NOT_HELD: list = []  # value in a folder, dtype of the model, words
NORM = "model.norm.weight"
BAD_FOLDERS = {
    "none": (lambda f: f.rename(f.parent / "away"), "hf is not a folder"),
    "no safetensors": (
        lambda f: [p.rename(p.with_suffix(".bin")) for p in f.glob("model*")],
        r"holds neither model.safetensors nor .*index.json; of weights it holds \['model-00001",
    ),
    "no json": (lambda f: index_of(f).write_text("{"), "is not an index of safetensors files"),
    "no map": (lambda f: index_of(f).write_text("{}"), "is not an index of safetensors files: KeyError"),
    "list": (lambda f: index_of(f).write_text('{"weight_map": ["a"]}'), "is not an index of safetensors files"),
    "nested": (lambda f: index_of(f).write_text("[" * 100_000), "is not an index of safetensors files"),
    "no files": (lambda f: index_of(f).write_text('{"weight_map": {}}'), "it lists no files"),
    "elsewhere": (
        lambda f: index_of(f).write_text('{"weight_map": {"a": "../hf/model-00001-of-00002.safetensors"}}'),
        "is outside of the folder",
    ),
    "no file": (lambda f: next(f.glob("*.safetensors")).unlink(), r"names \['model-.*'\], which is not there"),
    "cut off": (
        lambda f: next(f.glob("*.safetensors")).write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        "is not a safetensors file",
    ),
    "wrong file": (
        lambda f: index_of(f).write_text(
            json.dumps({"weight_map": {"absent": json.loads(index_of(f).read_text())["weight_map"][NORM]}})
        ),
        "says that model-.* holds 'absent', which it does not",
    ),
    "lacks": (lambda f: edited(f, lambda t: t.pop(NORM)), f"does not fit LlamaForCausalLM: it lacks {NORM}"),
    "more": (lambda f: edited(f, lambda t: t.update({"x": torch.ones(1)})), "the model has no x"),
    "shape": (
        lambda f: edited(f, lambda t: t.update({NORM: torch.ones(31)})),
        rf"shapes differ: {NORM}: \(31,\) in the folder, \(32,\) in the model",
    ),
    "int8": (
        lambda f: edited(f, lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        rf"dtypes do not convert \(quantised\?\): {NORM}: torch.int8 in the folder, torch.float64 in the model",
    ),
    "float8": (
        lambda f: edited(f, lambda t: t.update({NORM: torch.ones(32).to(torch.float8_e4m3fn)})),
        "torch.float8_e4m3fn in the folder",
    ),
}


for held, wanted in [
    (torch.int64, torch.int32),
    (torch.int64, torch.int8),
    (torch.uint8, torch.int8),
    (torch.int64, torch.float32),
    (torch.float32, torch.int64),
    (torch.bool, torch.int64),
    (torch.complex64, torch.float32),
    (torch.float32, torch.complex64),
    (torch.uint64, torch.int64),
]:
    NOT_HELD.append((torch.ones(3, dtype=held), wanted, "dtypes do not convert"))
NOT_HELD += [
    (torch.tensor([1.0, 1e300, 2.0], dtype=torch.float64), torch.float16, "values are beyond the range"),
    (torch.tensor([1.0, 1e5, 2.0]), torch.float16, "values are beyond the range"),
    (torch.tensor([1.0, -1e39, 2.0], dtype=torch.float64), torch.bfloat16, "values are beyond the range"),
]


class Holder(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", value)


@pytest.mark.parametrize(("value", "wanted", "words"), NOT_HELD, ids=lambda v: str(getattr(v, "dtype", v)))
def test_what_the_dtype_of_the_model_cannot_hold_is_refused_before_anything_is_read(tmp_path, value, wanted, words):
    save_file({"value": value}, tmp_path / "model.safetensors")
    model = Holder(torch.zeros(3, dtype=wanted))
    with pytest.raises(ValueError, match=words):
        load_hf_weights(model, tmp_path)
    assert not model.value.any()


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (torch.tensor([1.0, float("inf"), float("nan")]), torch.float16),
        (torch.tensor([1, -2, 3], dtype=torch.int8), torch.int64),
        (torch.tensor([1, 2, 255], dtype=torch.uint8), torch.int16),
        (torch.tensor([1.0, 6e4, 1e-9], dtype=torch.float64), torch.float16),
    ],
)
def test_what_the_dtype_of_the_model_can_hold_is_read(tmp_path, value, wanted):
    save_file({"value": value}, tmp_path / "model.safetensors")
    model = Holder(torch.zeros(3, dtype=wanted))
    load_hf_weights(model, tmp_path)
    torch.testing.assert_close(model.value, value.to(wanted), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_does_not_fit_is_refused_before_memory_is_given(folder, name):
    change, message = BAD_FOLDERS[name]
    change(folder)
    model = on_meta(tiny("llama", layers=1))
    with pytest.raises(ValueError, match=message):
        load_hf_weights(model, folder)
    assert all(p.is_meta for p in model.parameters())


def test_tied_weights_that_differ_are_refused(tmp_path):
    tiny("llama", layers=1).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"different values for model.embed_tokens.weight and lm_head.weight"):
        load_hf_weights(on_meta(tiny("llama", layers=1, tied=True)), tmp_path / "hf")


def test_experts_of_different_sizes_are_refused(tmp_path):
    tiny("qwen3_moe", layers=1).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    key = "model.layers.0.mlp.experts.3.down_proj.weight"
    edited(tmp_path / "hf", lambda t: t.update({key: torch.ones(2, 2)}))
    with pytest.raises(ValueError, match=r"down_proj cannot be made of .*experts\.0\.down_proj"):
        load_hf_weights(on_meta(tiny("qwen3_moe", layers=1)), tmp_path / "hf")


def test_gradient_hooks_on_meta_are_not_lost_in_silence(folder):
    model = on_meta(tiny("llama", layers=1))
    model.lm_head.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match=r"on meta with gradient hooks.* lm_head.weight"):
        load_hf_weights(model, folder)


def test_reading_without_safetensors_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install am-fsdp\[hf\]"):
        load_hf_weights(tiny("llama", layers=1), folder)


class Own(nn.Module):
    """Not of transformers: its names are the folder's."""

    def __init__(self, scale=None):
        super().__init__()
        self.one = nn.Linear(4, 6)
        self.two = nn.Linear(6, 4)
        self.two.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("steps", torch.tensor(3))
        if scale is not None:
            self.register_buffer("scale", scale, persistent=False)


def test_any_module_is_saved_and_read_under_its_own_names(tmp_path):
    torch.manual_seed(0)
    model = Own()
    model.one.weight.data[0, 0] = torch.nan
    save_hf_weights(model, tmp_path / "own")
    with torch.device("meta"):
        other = Own()
    kept = other.one.weight
    kept.decay = 0.5
    load_hf_weights(other, tmp_path / "own")
    assert other.one.weight is kept
    assert kept.decay == 0.5
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_buffer_that_nothing_computes_is_refused(tmp_path):
    save_hf_weights(Own(), tmp_path / "own")
    with torch.device("meta"):
        model = Own(torch.ones(2))
    with pytest.raises(ValueError, match="scale is on meta, and no folder holds it"):
        load_hf_weights(model, tmp_path / "own")
    model = Own()
    model.stray = torch.ones(1, device="meta")
    with pytest.raises(ValueError, match="stray is on meta and neither parameter nor buffer"):
        load_hf_weights(model, tmp_path / "own")


@pytest.mark.parametrize("size", [0, -1, True, "5 apples", "", 1.5, "0GB"])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be a positive number of bytes"):
        save_hf_weights(Own(), tmp_path / "own", max_shard_size=size)
    assert not (tmp_path / "own").exists()


def test_what_cannot_be_saved_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is not a folder"):
        save_hf_weights(Own(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype, got torch.int64"):
        save_hf_weights(Own(), tmp_path / "own", dtype=torch.int64)
    model = Own()
    model.register_buffer("wide", torch.ones(1, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"wide has the dtype torch.complex128"):
        save_hf_weights(model, tmp_path / "own")
    with torch.device("meta"):
        model = Own()
    with pytest.raises(ValueError, match=r"nothing to save in tensors on the meta device: one.bias, one.weight"):
        save_hf_weights(model, tmp_path / "own")
    save_hf_weights(Own(), tmp_path / "own", max_shard_size=100)
    assert len(list((tmp_path / "own").glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match="own holds weights already"):
        save_hf_weights(Own(), tmp_path / "own")


@pytest.mark.ranks(2)
def test_partial_sums_are_neither_saved_nor_read_into(tmp_path):
    model = Own()
    folder = shared(tmp_path / "own")
    save_hf_weights(model, folder)
    mesh = init_device_mesh(device_type(), (2,))
    model.one.weight = nn.Parameter(DTensor.from_local(model.one.weight.detach(), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"partial sums cannot be saved: one.weight"):
        save_hf_weights(model, shared(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"one.weight cannot be read into: a partial sum"):
        load_hf_weights(model, folder)


def test_configs_lie_beside_the_weights(tmp_path):
    model = tiny("qwen3", layers=1, tied=True)
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    save_hf_weights(model, tmp_path / "own", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    mine, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("own", "theirs"))
    assert mine["dtype"] == "bfloat16"
    assert mine | {"dtype": theirs["dtype"]} == theirs
    assert model.dtype == torch.float64
    own, theirs = (json.loads((tmp_path / f / "generation_config.json").read_text()) for f in ("own", "theirs"))
    assert own == theirs
    again = tiny("qwen3", layers=1, tied=True)
    load_hf_weights(again, tmp_path / "own")
    assert (again.generation_config.temperature, again.generation_config.do_sample) == (0.25, True)
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps(own | {"do_sample": False}))
    with pytest.warns(UserWarning, match=r"generation_config\.json is not read"):
        load_hf_weights(again, tmp_path / "own")
    assert again.generation_config.do_sample


@pytest.mark.parametrize("mesh", ["dp2", "tp2"])
@pytest.mark.ranks(2)
def test_save_pretrained_says_what_to_call_and_state_dict_is_that_of_the_shards(tmp_path, mesh):
    single = tiny("qwen3", tied=True)
    model = laid_out(tiny("qwen3", tied=True), mesh)
    with pytest.raises(RuntimeError, match=r"call am_fsdp\.save_hf_weights\(model, folder\) on every rank"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for leave_gathered in (False, True):
        if leave_gathered:
            model(token_batch(1, 8)[0])
        state = model.state_dict()
        assert set(state) == set(single.state_dict())
        assert all(whole(value).equal(single.state_dict()[name]) for name, value in state.items())
        assert all(isinstance(p, DTensor) for p in model.parameters())


def part_of(single, kept):
    """As a pipeline leaves it: modules without parameters in place of what other stages hold."""
    part = copy.deepcopy(single)
    for index in {0, 1, 2, 3} - set(kept):
        part.model.layers[index] = nn.Identity()
    if 0 not in kept:
        part.model.embed_tokens = nn.Identity()
    if 3 not in kept:
        part.model.norm = nn.Identity()
        part.lm_head = nn.Identity()
    return part


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["one part", "two parts"])
@pytest.mark.ranks(4)
def test_the_parts_of_a_pipeline_are_written_as_one_folder(tmp_path, family, interleaved):
    single = tiny(family, tied=family == "qwen3", dtype=torch.float32)
    stage = dist.get_rank() // 2
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("pp", "data_parallel"))["data_parallel"]
    kept = [[0], [2]] if stage == 0 else [[1], [3]]
    parts = [part_of(single, each) for each in (kept if interleaved else [[0, 1] if stage == 0 else [2, 3]])]
    for part in parts:
        fsdp2_strategy_parallelize(part, mesh, torch.float32)
    folder = shared(tmp_path / "hf")
    save_hf_weights(parts if interleaved else parts[0], folder, max_shard_size="20KB", pipeline_parts=True)
    again = type(single).from_pretrained(folder)
    assert all(again.get_parameter(name).equal(p) for name, p in single.named_parameters())
    with pytest.raises(
        ValueError, match="hold different tensors .* pipeline_parts=True" if not interleaved else "one module"
    ):
        save_hf_weights(parts if interleaved else parts[0], shared(tmp_path / "other"))
    lacking = parts[:1] if interleaved or stage else [part_of(single, [0])]
    with pytest.raises(ValueError, match=r"the parts on the ranks of the group lack .* give all parts"):
        save_hf_weights(lacking, shared(tmp_path / "other"), pipeline_parts=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mesh", ["dp4", "dp2tp2"])
@pytest.mark.ranks(4, timeout=120)
def test_a_save_never_holds_more_than_a_few_tensors_beside_the_shards(tmp_path, family, mesh):
    """Those that this rank writes now and next, and the one that all ranks gather, however many there are."""
    model = laid_out(tiny(family, layers=6, hidden_size=256, intermediate_size=256, vocab_size=256), mesh)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    ledger = Ledger(next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh)
    ledger.hold(*(p.to_local() for p in model.parameters()))
    before = ledger.live
    with ledger:
        save_hf_weights(model, shared(tmp_path / "saved"), max_shard_size=sum(sizes) // 6)
    assert ledger.peak > before, "the ledger saw nothing"
    assert ledger.peak - before <= 5 * max(sizes) < sum(sizes) / 2
    assert ledger.live <= before + max(sizes) // 100
