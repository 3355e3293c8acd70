"""Looking up rows of an embedding whose vocabulary is spread over the ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional as F


class VocabularyRows(nn.Embedding):
    """`nn.Embedding` on this rank's rows: zeros for ids that lie elsewhere, so that the ranks' sum is the lookup.

    Torch's own sharded lookup keeps its mask in the placement, which the gradient of a later layer cannot always be
    brought to (`Redistribution from one partial type ... is unsupported`). This one is `Partial()` and nothing else.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(...)` int ids, replicated, to a `Partial` DTensor `(..., embedding_dim)`. Issues no collective."""
        weight = self.weight
        if not isinstance(weight, DTensor):
            return super().forward(input)
        ids = input.to_local() if isinstance(input, DTensor) else input
        rows, here, padding = rows_here(ids, weight, self.padding_idx)
        out = F.embedding(rows, weight.to_local(), padding).masked_fill(~here.unsqueeze(-1), 0)
        return DTensor.from_local(out, weight.device_mesh, [Partial()], run_check=False)


def rows_here(
    ids: torch.Tensor, weight: DTensor, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor, int | None]:
    """Ids as rows of this rank's shard, which of them lie here, and the padding row if it does.

    Args:
        ids: any shape, int, within the whole vocabulary.
        weight: `(num_embeddings, dim)`, `Shard(0)`.
    """
    mesh = weight.device_mesh
    first = mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
    count = weight.to_local().shape[0]
    rows = ids - first
    here = (rows >= 0) & (rows < count)
    padded_here = padding_idx is not None and first <= padding_idx < first + count
    return rows.clamp(0, count - 1), here, padding_idx - first if padded_here else None
