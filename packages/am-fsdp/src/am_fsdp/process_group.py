"""Leave the process group."""

from __future__ import annotations

import torch.distributed as dist


def _destroy_dist_connection() -> None:
    """Destroy the default process group if there is one; may be called twice, and from any thread."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
