"""`docs/examples/verify.py` answers whether a layout may be trusted: exact, wrong, or refused with the reason."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401
from torch import nn

from am_testkit.device import device_type
from am_testkit.models import tiny

VERIFY = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "verify.py"

sys.path.insert(0, str(VERIFY.parent))

import verify

from verifying import conditions
from verifying.ranks import measure, title
from verifying.report import EXACT, REFUSED, WRONG, Result, agree, exit_code, table
from verifying.shrink import shrink

ONCE = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)
MINE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.noise = noise

    def forward(self, hidden):
        return hidden + self.down(self.up(self.norm(hidden)).relu()) + self.noise * torch.rand(())


class Mine(nn.Module):
    def __init__(self, layers=4, noise=0.0, looks=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.layers = nn.ModuleList(Block(noise) for _ in range(layers))
        self.looks = looks

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden / hidden.norm().item() if self.looks and number == 3 else hidden)
        return self.head(hidden)


def exact():
    return Mine()


def random():
    return Mine(noise=1.0)


def refused():
    return Mine(looks=True)


class OtherWhenCompiled(Block):
    def forward(self, hidden):
        return 2 * super().forward(hidden) if torch.compiler.is_compiling() else super().forward(hidden)


def other_when_compiled():
    model = Mine()
    model.layers = nn.ModuleList(OtherWhenCompiled(0.0) for _ in range(4))
    return model
"""


@ONCE
def test_a_model_type_is_exact_from_any_directory(tmp_path):
    done = launch("llama", "--pp", 2, cwd=tmp_path)
    assert done.returncode == EXACT, done.stdout + done.stderr
    assert "llama, shrunk: pp 2" in done.stdout
    assert "(a) exact" in done.stdout
    assert "(b) exact" in done.stdout
    worst = [float(line.split()[-2]) for line in done.stdout.splitlines() if line.startswith("gradient of ")]
    assert 0 < max(worst) < 1e-4


@ONCE
def test_what_is_refused_says_why_and_exits_with_two(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    done = launch("mine:refused", "--pp", 2, "--conditions", "batch=ids", "numbers=float32", cwd=tmp_path)
    assert done.returncode == REFUSED, done.stdout + done.stderr
    assert "(a) refused: ValueError: Mine cannot be cut" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("layout", "code"), [("--pp 2", EXACT), ("--dp 2", EXACT), ("--tp 2", REFUSED)], ids=["pp", "dp", "tp"]
)
@pytest.mark.ranks(2)
def test_a_function_of_the_user_builds_the_model(layout, code, tmp_path):
    write(tmp_path / "mine.py", MINE)
    result = verified(f"{tmp_path}/mine.py:exact", *layout.split(), "--conditions", "batch=ids", "numbers=float64")
    assert result.code == code, table([result])


@pytest.mark.ranks(2)
def test_a_model_that_parts_from_one_process_is_found(tmp_path):
    write(tmp_path / "mine.py", MINE)
    result = verified(f"{tmp_path}/mine.py:random", "--dp", "2", "--conditions", "batch=ids", "numbers=float32")
    assert result.code == WRONG
    assert "(a) WRONG" in table([result])


@pytest.mark.parametrize(("words", "code"), [("", EXACT), ("--compile aot_eager", WRONG)], ids=["eager", "compiled"])
@pytest.mark.ranks(2)
def test_only_the_layout_is_compiled_and_that_only_if_asked_for(words, code, tmp_path):
    write(tmp_path / "mine.py", MINE)
    subject = f"{tmp_path}/mine.py:other_when_compiled"
    result = verified(subject, "--dp", "2", *words.split(), "--conditions", "batch=ids", "numbers=float32", "calls=one")
    assert result.code == code, table([result])


@pytest.mark.ranks(2)
def test_a_compiled_layout_is_exact_and_the_title_says_so():
    words = ["llama", "--tp", "2", "--compile", "aot_eager", "--conditions", "numbers=float64", "calls=one"]
    result = verified(*words)
    assert result.code == EXACT, table([result])
    said = title(verify.parse_arguments(words))
    assert "tp 2, ep 1, layers compiled by aot_eager; 4 sequences of 32 tokens against one eager process" in said


def test_a_backend_that_torch_does_not_have_is_refused(capsys):
    with pytest.raises(SystemExit):
        verify.parse_arguments(["llama", "--tp", "2", "--compile", "inducktor"])
    assert "--compile inducktor: torch has no such backend; it has" in capsys.readouterr().err


@pytest.mark.ranks(2)
def test_a_mask_that_the_model_does_not_take_is_refused(tmp_path):
    write(tmp_path / "mine.py", MINE)
    result = verified(f"{tmp_path}/mine.py:exact", "--pp", "2", "--conditions", "numbers=float32")
    assert "batch=padding needs attention_mask, which Mine.forward does not take; use batch=ids" in result.refused


@pytest.mark.parametrize("layout", ["--pp 2", "--dp 2 --recompute full", "--tp 2 --sequence-parallel"])
@pytest.mark.ranks(2)
def test_a_folder_is_verified_with_its_weights(layout, tmp_path):
    folder = tmp_path / "saved"
    if dist.get_rank() == 0:
        tiny("llama", tied=True, dtype=torch.float32).save_pretrained(folder)
    dist.barrier()
    words = [str(folder), *layout.split(), "--conditions", "numbers=float64", "batch=left-padding", "calls=one"]
    result = verified(*words)
    assert result.code == EXACT, table([result])
    assert verify.parse_arguments(words).subject.shrink is False
    model = verify.parse_arguments(words).subject.build("sdpa", torch.float32, seed=9)
    weight = tiny("llama", tied=True, dtype=torch.float32).model.embed_tokens.weight
    assert model.model.embed_tokens.weight.equal(weight), "the folder's own weights"


def test_conditions_are_read_and_what_does_not_exist_is_refused():
    every = conditions.read(["attention=sdpa,eager", "calls=one"])
    assert [str(c) for c in every][:2] == ["sdpa, float32, padding, one", "sdpa, bfloat16, padding, one"]
    assert len(every) == 4
    with pytest.raises(ValueError, match="there is no 'head'; there are attention, numbers"):
        conditions.read(["head=none"])
    with pytest.raises(ValueError, match="numbers can be float32, bfloat16"):
        conditions.read(["numbers=float8"])


def test_the_worst_comes_first_and_one_that_is_wrong_decides():
    fine, bad, refused = (Result(condition) for condition in conditions.read(["numbers=float32,bfloat16,float64"]))
    fine.errors, bad.errors = {"weight a": 1e-7, "weight b": 1e-6}, {"weight a": 1.0, "weight b": 1e-3}
    refused.refused = "ValueError: no"
    lines = table([fine, bad, refused]).splitlines()
    assert lines[5].split() == ["weight", "a", "1.0e-07", "1.0e+00"]
    assert lines[-3:] == ["(a) exact, 1.0e-06 at most", "(b) WRONG, 1.0e+00 at most", "(c) refused: ValueError: no"]
    assert [exit_code(r) for r in ([fine], [fine, refused], [fine, bad, refused])] == [EXACT, REFUSED, WRONG]


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "bloom", "phi3"])
def test_a_config_of_any_family_shrinks_to_one_that_runs(model_type):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shrink(AutoConfig.for_model(model_type), layers=4, ranks_of_heads=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    assert sum(p.numel() for p in model.parameters()) < 1_500_000
    assert len(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1)) == 4
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def launch(*arguments, cwd):
    theirs = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(theirs)} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(VERIFY), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)


def write(path, text):
    if dist.get_rank() == 0:
        path.write_text(text)
    dist.barrier()


def verified(*words):
    """The result of all ranks under the one condition of these arguments."""
    args = verify.parse_arguments(list(words))
    (condition,) = args.conditions
    store = dist.PrefixStore("verify", dist.distributed_c10d._get_default_store())
    mine = measure(args, condition, torch.device(device_type()))
    return agree(mine, 0, store, dist.get_rank(), dist.get_world_size())
