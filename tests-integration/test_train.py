"""`docs/examples/train.py` as a user runs it: exact, and clear about bad degrees."""

from __future__ import annotations

import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest
from torch import nn

TRAIN = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "train.py"

sys.path.insert(0, str(TRAIN.parent))

from training import checkpoint
from training.compiled import compile_layers
from training.degrees import Degrees
from training.model import build_config
from training.text import ByteText

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)

LAYOUTS = {
    "pp2": ["--pp", "2", "--dp", "1", "--ep", "1"],
    "dp2": ["--pp", "1", "--dp", "2", "--ep", "1"],
    "tp2-sp": ["--pp", "1", "--dp", "1", "--tp", "2", "--sequence-parallel"],
    "copies2-ep4": ["--pp", "1", "--dp-replicate", "2", "--dp", "2", "--ep", "4"],
    "pp2-ep2-dp2": ["--pp", "2", "--dp", "2", "--ep", "2"],
    "pp2-cp2-ep2": ["--pp", "2", "--dp", "1", "--cp", "2", "--ep", "2"],
    "lora": ["--pp", "2", "--dp", "2", "--config", "llama", "--lora", "4"],
    "compiled": ["--pp", "2", "--dp", "2", "--config", "llama", "--compile", "aot_eager"],
}
if os.environ.get("AM_SWEEP"):  # eight processes on two cores take a minute
    LAYOUTS["pp2-cp2-tp2"] = ["--pp", "2", "--dp", "1", "--cp", "2", "--tp", "2", "--sequence-parallel"]


LONG = ("pp2-ep2-dp2", "lora")  # which see all of the steps that --check holds to its tolerance


def launch(processes, *arguments, **settings):
    """Start torchrun with nothing of the surrounding run's rendezvous in its environment."""
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, str(TRAIN), *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **settings,
    )


def finish(process, timeout=240):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def size(arguments):
    degree = dict(zip(arguments[::2], arguments[1::2], strict=False))
    return math.prod(int(degree.get(name, 1)) for name in ("--pp", "--dp-replicate", "--dp", "--cp", "--tp"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_agrees_with_one_process(layout, tmp_path):
    arguments = LAYOUTS[layout]
    steps = ["--steps", 20] if layout in LONG else ["--steps", 4, "--batch", 8, "--seq-len", 64]
    code, output = finish(launch(size(arguments), *arguments, *steps, "--check", "--out", tmp_path))
    assert code == 0, output
    assert "check: the run agrees with one process" in output
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    pictures = 2 + (tmp_path / "timeline.png").exists() + (tmp_path / "load.png").exists()
    assert page.count("data:image/png") == pictures
    assert page.count("<tr>") == 5 + 1 + size(arguments), "facts, and a line for each rank"
    if "--pp 2" in " ".join(arguments):
        assert (tmp_path / "timeline.png").stat().st_size > 10_000


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_other_experts_agree_with_one_process_too(family, tmp_path):
    arguments = [*LAYOUTS["pp2-ep2-dp2"], "--config", family, "--steps", 3, "--batch", 8, "--seq-len", 32]
    code, output = finish(launch(4, *arguments, "--check", "--out", tmp_path))
    assert code == 0, output
    assert "check: the run agrees with one process" in output


def test_a_check_that_should_fail_fails(tmp_path):
    code, output = finish(launch(2, *LAYOUTS["pp2"], "--steps", 3, "--check", "--tolerance", 0, "--out", tmp_path))
    assert code != 0
    assert "PARTS from one process" in output


def test_degrees_that_do_not_fit_are_refused_by_the_launch_before_any_collective(tmp_path):
    code, output = finish(launch(2, "--pp", 2, "--dp", 2, "--out", tmp_path / "nothing"))
    assert code != 0
    words = "^ValueError: --pp 2 x --dp 2 x --tp 1 is 4 ranks, but 2 were started"
    assert len(re.findall(words, output, re.MULTILINE)) == 1, "its traceback once"
    # torchrun may end the other rank before it says anything
    assert len(re.findall("^rank [01] ends in the start: rank [01] failed in the start: ValueError", output, re.M)) <= 1
    assert "init_process_group" not in output


DENSE = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "model_type": "llama"}
WIDE = DENSE | {"num_key_value_heads": 4}
SIX = DENSE | {"num_attention_heads": 6}
SPARSE = DENSE | {"num_experts": 8, "model_type": "qwen3_moe"}


@pytest.mark.parametrize(
    ("degrees", "world", "config", "sizes", "words"),
    [
        ({"dp_shard": 2, "ep": 3}, 2, SPARSE, (16, 2, 128), r"--ep 3 must divide --dp 2 x --tp 1: .*; it can be 1, 2"),
        ({"dp_shard": 0}, 2, SPARSE, (16, 2, 128), r"--dp must be at least 1, got 0"),
        ({"dp_shard": 2, "ep": 2}, 2, DENSE, (16, 2, 128), r"llama has no experts; use --ep 1"),
        ({"dp_shard": 3, "ep": 3}, 3, SPARSE, (18, 2, 128), r"--ep 3 must divide the model's 8 experts"),
        ({"tp": 8}, 8, SPARSE, (16, 2, 128), r"--tp 8 .* num_attention_heads=4 and .*=2: it can be 1, 2, 4"),
        ({"tp": 3}, 3, SIX | {"num_key_value_heads": 2}, (18, 2, 126), r"--tp 3 does not fit .*: it can be 1, 2, 6"),
        ({"pp": 8}, 8, DENSE, (16, 2, 128), r"--pp 8 is more than the model's 4 layers"),
        ({"dp_shard": 2}, 2, DENSE, (7, 1, 128), r"--batch 7 must be a multiple of --dp 2: 8"),
        ({"pp": 2}, 2, DENSE, (6, 4, 128), r"--microbatch 4 must divide the 6 sequences"),
        ({"pp": 2, "sequence_parallel": True}, 2, DENSE, (16, 2, 128), r"--sequence-parallel needs --tp"),
        ({"tp": 2, "sequence_parallel": True}, 2, DENSE, (16, 2, 127), r"--seq-len 127 must be a multiple of --tp 2"),
        (
            {"tp": 4, "sequence_parallel": True, "cp": 3},
            12,
            WIDE,
            (16, 2, 126),
            r"126 must be a multiple of --cp 3 x --tp 4",
        ),
        ({"cp": 2}, 2, DENSE, (16, 2, 126), r"--seq-len 126 must be a multiple of twice --cp 2: 128"),
        ({"ep": 3, "cp": 4}, 4, SPARSE, (16, 2, 128), r"--ep 3 must divide --dp 1 x --cp 4 x --tp 1"),
        ({"cp": 2}, 4, DENSE, (16, 2, 128), r"--cp 2 x --tp 1 is 2 ranks, but 4 were started"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_what_would(degrees, world, config, sizes, words):
    with pytest.raises(ValueError, match=words):
        Degrees(**degrees).check(world, types.SimpleNamespace(**config), *sizes)


def test_compiling_takes_the_layers_of_a_part_whole_and_refuses_a_model_without():
    experts = nn.ModuleList([nn.Linear(2, 2)])
    layers = nn.ModuleList([nn.ModuleDict({"experts": experts}), nn.Identity()])
    model = nn.ModuleDict({"body": nn.ModuleDict({"layers": layers})})
    compile_layers(model, "eager")
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl]
    assert compiled == ["body.layers.0"], "neither experts by themselves nor what holds another stage's place"
    with pytest.raises(ValueError, match="--compile: Linear has no list of layers"):
        compile_layers(nn.Linear(2, 2), "eager")


def test_what_is_neither_a_model_nor_a_text_nor_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a transformers model type"):
        build_config("no_such_model", 1)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        ByteText(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama", "qwen3", "qwen2"])
def test_a_local_config_folder_gives_the_same_model_as_its_type(name, tmp_path):
    build_config(name, 2).save_pretrained(tmp_path)
    assert build_config(str(tmp_path), 1).hidden_size == 128
    assert build_config(str(tmp_path), 2).hidden_size == 256
