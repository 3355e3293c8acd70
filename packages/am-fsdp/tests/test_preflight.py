"""What a preflight says, against a real step on four ranks under the same ledger."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from am_fsdp import fsdp2_strategy_parallelize
from am_fsdp.__main__ import main
from am_fsdp.preflight import measure_step, preflight
from am_testkit.device import device_type
from am_testkit.models import tiny, token_batch
from am_testkit.zoo import small

DATA, TENSOR = "data_parallel", "tensor_parallel"
LAYOUTS = {
    "data": ({DATA: 4}, {}),
    "hybrid": ({"replicas": 2, DATA: 2}, {"dp_mesh_name": ["replicas", DATA]}),
    "tensor": ({DATA: 2, TENSOR: 2}, {}),
    "sequence": ({DATA: 2, TENSOR: 2}, {"sequence_parallel": True}),
    "recomputed": ({DATA: 4}, {"activation_checkpointing": "full"}),
    "selective": ({DATA: 2, TENSOR: 2}, {"activation_checkpointing": "selective"}),
}
SCRIPT = """
import json, sys
from dataclasses import asdict
import torch
from am_fsdp.preflight import preflight
from am_testkit.models import tiny
family, layouts = json.loads(sys.argv[1])
make = lambda: tiny(family, dtype=torch.float32)
sizes = dict(batch=2, seq_len=8, param_dtype=torch.float32)
print(json.dumps({name: asdict(preflight(make, axes, **sizes, **how)) for name, (axes, how) in layouts.items()}))
"""


# qwen3 has norms on its heads besides, which change what a tensor axis does.
MEASURED = {"llama": list(LAYOUTS), "qwen3": ["hybrid", "sequence", "selective"]}


def preflights_elsewhere(family):
    """The reports of a process that is in no process group; the same on every rank."""
    said = [None]
    if dist.get_rank() == 0:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            SCRIPT,
            json.dumps([family, {name: LAYOUTS[name] for name in MEASURED[family]}]),
        ]
        said = [json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)]
    dist.broadcast_object_list(said, src=0)
    return said[0]


@pytest.mark.parametrize("family", MEASURED)
@pytest.mark.ranks(4, timeout=120)
def test_a_preflight_counts_what_four_real_ranks_do(family):
    ids, _ = token_batch(2, 8, vocab_size=60)
    meshes = {}  # one for the same axes: DTensor may go on with the groups of an equal mesh that was there before
    for name, told in preflights_elsewhere(family).items():
        axes, how = LAYOUTS[name]
        if tuple(axes) not in meshes:
            meshes[tuple(axes)] = init_device_mesh(device_type(), tuple(axes.values()), mesh_dim_names=tuple(axes))
        mesh = meshes[tuple(axes)]
        model = fsdp2_strategy_parallelize(tiny(family, dtype=torch.float32), mesh, torch.float32, **how)
        model(input_ids=ids, labels=ids).loss.backward()  # a first forward compares what ranks run
        model.zero_grad()
        ledger, state, peak = measure_step(model, mesh, {"input_ids": ids, "labels": ids})
        assert [asdict(traffic) for traffic in ledger.traffic] == told["traffic"], name
        assert sum(p.to_local().nbytes for p in model.parameters()) == told["parameters"], name
        assert sum(p.grad.to_local().nbytes for p in model.parameters()) == told["gradients"], name
        assert state == told["optimizer"], name
        assert peak == pytest.approx(told["peak"], rel=0.05), name  # a real collective holds its buffers a bit longer


def test_thousands_of_ranks_take_seconds_and_their_shards_are_small():
    torch.manual_seed(0)
    started = time.monotonic()
    report = preflight(lambda: tiny("llama", dtype=torch.float32), {DATA: 512, TENSOR: 2}, seq_len=16)
    assert time.monotonic() - started < 20
    assert report.held < report.whole / 40  # at least one row of each parameter
    assert report.traffic[0].ranks == 512
    assert not dist.is_initialized()


def test_recomputation_lowers_the_peak_and_gathers_again():
    def report(mode):
        how = {"param_dtype": torch.float32, "activation_checkpointing": mode}
        return preflight(lambda: tiny("llama", dtype=torch.float32), {DATA: 4}, batch=8, seq_len=256, **how)

    none, mlp, full = (report(mode) for mode in (False, "mlp", "full"))
    assert full.peak < mlp.peak < none.peak
    assert full.traffic == none.traffic


@pytest.mark.parametrize("ranks", [2, 4], ids=["", "with shared heads"])
def test_the_command_takes_models_whose_plan_is_derived(tmp_path, capsys, ranks):
    small("mistral").config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--dp", "2", "--tp", str(ranks), "--seq-len", "32"]) == 0
    assert f"on each of {2 * ranks} ranks" in capsys.readouterr().out


def test_the_command_prints_a_table_and_says_what_is_wrong(tmp_path, capsys):
    small("qwen3").config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--dp", "64", "--tp", "2", "--sp", "--seq-len", "32"]) == 0
    table = capsys.readouterr().out
    assert "on each of 128 ranks" in table
    for row in ("optimizer state", "peak", "all-gather over data_parallel", "reduce-scatter over tensor_parallel"):
        assert row in table
    for arguments, message in (
        (["--dp", "0"], "must be positive"),
        (["--dp", "2", "--tp", "3"], "3"),
        (["--dp", "2", "--dtype", "int8"], "'int8' is not a floating-point dtype"),
        (["--dp", "2", "--checkpointing", "some"], "activation checkpointing must be"),
    ):
        assert main(["plan", str(tmp_path), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "absent"), "--dp", "2"]) == 2
    assert "neither a folder with a config.json nor a model type" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--dp", "--tp", "--replicas", "--batch", "--seq-len"])
def test_the_command_refuses_absurd_sizes_at_once(capsys, option):
    assert main(["plan", "llama", "--dp", "2", option, "1000000000000"]) == 2
    assert "beyond what can be" in capsys.readouterr().err


def test_the_command_refuses_a_config_of_absurd_depth_at_once(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1000000000}')
    assert main(["plan", str(tmp_path), "--dp", "2"]) == 2
    assert "1000000000 layers are beyond what can be" in capsys.readouterr().err


@pytest.mark.ranks(1)
def test_a_preflight_is_refused_inside_a_process_group():
    with pytest.raises(ValueError, match="run it where no other has been initialised"):
        preflight(lambda: tiny("llama"), {DATA: 2})


def test_a_forward_that_depends_on_values_is_refused():
    class Depends(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

        def forward(self, input_ids, labels):
            return self.layers[0](torch.ones(int(input_ids.sum()), 4))

    with pytest.raises(ValueError, match="the forward of FSDPDepends depends on values"):
        preflight(Depends, {DATA: 2})
