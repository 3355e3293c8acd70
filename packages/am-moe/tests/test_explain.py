"""What is explained without devices is what real ranks do."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from am_moe import ExpertLoad, apply_ep, describe_experts, explain, plot_load
from am_moe.__main__ import main
from am_moe.explain import leaving_rows
from am_testkit.device import device_type
from am_testkit.models import tiny
from am_testkit.zoo import OLDEST, small


def test_experts_are_described_whatever_their_layout():
    expected = {
        "gpt_oss": "model.layers.0.mlp.experts: 4 experts of GptOssExperts, routed; gate_up_proj, gate_up_proj_bias, "
        "down_proj, down_proj_bias",
        "dbrx": "transformer.blocks.0.ffn.experts: 4 experts of DbrxExperts, routed; mlp.w1 (48 rows each), "
        "mlp.v1 (48 rows each), mlp.w2 (48 rows each)",
        "longcat_flash": "model.layers.0.mlp.experts: 4 experts of LongcatFlashExperts, routed; gate_up_proj, "
        "down_proj; larger ids return the token",
        "jetmoe": "model.layers.0.mlp.input_linear: 4 experts of JetMoeParallelExperts, linear; weight",
    }
    if OLDEST:  # which refuses the sizes in DbrxConfig
        del expected["dbrx"]
    assert {name: str(describe_experts(small(name))[0]) for name in expected} == expected


def test_parameters_that_all_experts_share_are_told_from_stacked_ones():
    muse = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig

    config = MuseSparkTextConfig(num_local_experts=4, moe_hidden_size=4, moe_intermediate_size=6)
    (found,) = describe_experts(nn.ModuleDict({"experts": muse.MuseSparkExperts(config)}))
    assert set(found.stacked) == {"gate_up_proj", "down_proj"}
    assert all(path.startswith("post_expert_norm.") for path in found.shared)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 6))
def test_a_token_never_leaves_more_often_than_it_has_choices_or_other_ranks(local, choices, ranks):
    experts = local * ranks
    choices = min(choices, experts)
    rows = leaving_rows(experts, choices, ranks)
    assert 0 <= rows <= min(ranks - 1, choices) + 1e-12
    assert rows <= choices * (1 - 1 / ranks) + 1e-12 or ranks == 1


@pytest.mark.ranks(4)
def test_the_rows_of_real_ranks_are_those_explained():
    model = tiny("qwen3_moe", layers=1, num_experts_per_tok=4)
    expected = explain(model, 4).rows
    apply_ep(model, init_device_mesh(device_type(), (4,), mesh_dim_names=("ep",)))
    spread = model.model.layers[0].mlp.experts.spread_experts
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.rand(4000, 8, generator=generator).topk(4).indices
    hidden = torch.zeros(4000, 1)
    routes = spread.dispatcher.dispatch(hidden, ids, hidden.expand(-1, 4), 2, spread.mesh.get_group()).back
    leaving = sum(routes.sent) - routes.sent[dist.get_rank()]
    assert leaving / 4000 == pytest.approx(expected, rel=0.02)


def test_the_command_explains_a_config_without_weights(tmp_path, capsys):
    config = tiny("qwen3_moe", layers=2).config
    config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--ep", "4", "--data", "8"]) == 0
    printed = capsys.readouterr().out
    assert "Qwen3MoeForCausalLM: 2 layers with experts, 2 of 8 for a token" in printed
    assert "rank 3: experts 6 to 7 of each layer" in printed
    assert "over 8 data ranks" in printed


def test_wrong_requests_are_refused(capsys):
    assert main(["explain", "qwen3_moe", "--ep", "3"]) == 2
    assert "ep 3 does not divide the 128 experts of model.layers.0.mlp.experts: [1, 2, 4" in capsys.readouterr().err
    assert main(["explain", "llama", "--ep", "2"]) == 2
    assert "LlamaForCausalLM has no experts to explain" in capsys.readouterr().err
    assert main(["explain", "no/such/folder", "--ep", "2"]) == 2
    with pytest.raises(ValueError, match="data 6 must be a multiple of ep 4"):
        explain(tiny("qwen3_moe", layers=1), 4, data=6)


@pytest.mark.parametrize("option", ["--ep", "--data"])
def test_the_command_refuses_absurd_numbers_of_ranks_at_once(capsys, option):
    assert main(["explain", "qwen3_moe", "--ep", "2", option, "1000000000"]) == 2
    assert "1000000000 ranks are beyond what can be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"num_local_experts": 10**9}, "1000000000 experts are beyond what can be"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers with 8 experts are beyond"),
        ({"hidden_size": 10**18}, "the config of .* makes no model"),
        ({"num_experts_per_tok": 10**9}, "a token cannot choose 1000000000 of 8 experts"),
    ],
)
def test_the_command_refuses_absurd_sizes_of_a_config_at_once(tmp_path, capsys, size, words):
    config = tiny("qwen3_moe", layers=1).config.to_dict() | size
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["explain", str(tmp_path), "--ep", "2"]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("data", [0, -8])
def test_no_data_ranks_are_refused(data):
    with pytest.raises(ValueError, match=f"data {data} must be a multiple of ep 4"):
        explain(tiny("qwen3_moe", layers=1), 4, data=data)


def test_a_load_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model = tiny("qwen3_moe", layers=3)
    load = ExpertLoad(model)
    with pytest.raises(ValueError, match="a picture needs some choices"):
        plot_load(load.total(), str(tmp_path / "none.png"))
    model(torch.randint(0, 90, (2, 8)))
    plot_load(load.total(), str(tmp_path / "load.png"), "three layers", ranks=2)
    assert (tmp_path / "load.png").stat().st_size > 5000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install am-moe\[plot\]"):
        plot_load(load.total(), str(tmp_path / "load.png"))
