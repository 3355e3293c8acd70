"""The main job on CUDA ranks that share one GPU: exact, and resumed. `nox -s gpu` runs it."""

from __future__ import annotations

import pathlib

import pytest
import torch

from am_testkit.torchrun import Torchrun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
JOB = pathlib.Path(__file__).parent / "shared_gpu.py"
SMALL = ["--batch", "8", "--seq-len", "64", "--save-every", "3"]
LAYOUTS = {
    "pp2-dp2-ep2": "--pp 2 --dp 2 --ep 2",
    "dp2-tp2-sp": "--pp 1 --dp 2 --tp 2 --sequence-parallel --config llama",
    "pp2-cp2-ep2": "--pp 2 --dp 1 --cp 2 --ep 2",
    "copies2-dp2": "--pp 1 --dp-replicate 2 --dp 2 --config qwen3",
    "dp4-ep4": "--pp 1 --dp 4 --ep 4 --microbatch 1",
    "pp2-tp2-zbv": "--pp 2 --dp 1 --tp 2 --config qwen3 --schedule ZBVZeroBubble",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_and_its_continuation_agree_with_one_process(layout, tmp_path):
    for steps, more in (("3", []), ("6", ["--resume"])):
        arguments = [*LAYOUTS[layout].split(), *SMALL, "--steps", steps, "--check", "--tolerance", "3e-5", *more]
        with Torchrun(4, JOB, *arguments, "--out", tmp_path) as job:
            assert job.finish(150) == 0, job.output
        assert "check: the run agrees with one process" in job.output
        print(next(line for line in job.output.splitlines() if line.startswith("check:")))
