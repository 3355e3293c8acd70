"""The main job with all ranks on the first GPU: `torchrun --nproc-per-node 4 tests-integration/shared_gpu.py --check`.

Its arguments are those of `docs/examples/train.py`. Without a GPU it runs on the CPU through the same process group.
"""

from __future__ import annotations

import pathlib
import sys

import torch
import torch.distributed as dist

import am_testkit.staged

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "docs" / "examples"))

import train


def start(store: dist.Store, rank: int, world_size: int) -> torch.device:
    """In place of the job's own, which takes NCCL and a GPU for each rank, or gloo."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(am_testkit.staged.NAME, store=store, rank=rank, world_size=world_size)
    return device


if __name__ == "__main__":
    train.start = start
    train.main()
