"""Copy a model's module tree with stand-ins for what is left out. Tensors and configs are shared, never copied."""

from __future__ import annotations

import copy

from torch import nn

from am_pipeline.anatomy import Anatomy
from am_pipeline.boundary import AbsentEmbedding, AbsentLayer, AbsentModule, Boundary


def copy_without(
    model: nn.Module, anatomy: Anatomy, held: set[str], boundary: Boundary, returns_tuple: bool
) -> nn.Module:
    """The model with stand-ins for every module with parameters that is not in `held` or below a module that is.

    Args:
        model: the whole model; it is not changed.
        anatomy: where its decoder stack is.
        held: full names of the modules to keep.
        boundary: what the stand-ins read and write.
        returns_tuple: whether the model's layers return tuples, so that absent ones do too.
    """
    memo: dict[int, object] = {}

    def keep(value: object) -> None:
        memo[id(value)] = value

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            if full in held:
                continue
            if full.rpartition(".")[0] == anatomy.stack:
                memo[id(child)] = AbsentLayer(child)
                memo[id(child)].returns_tuple = returns_tuple
            elif full == anatomy.stack or any(n.startswith(f"{full}.") for n in (*held, anatomy.stack)):
                visit(child, f"{full}.")
            elif isinstance(child, nn.Embedding):
                memo[id(child)] = AbsentEmbedding(child.embedding_dim, boundary)
            elif any(True for _ in child.parameters()):
                memo[id(child)] = AbsentModule()

    visit(model, "")
    for module in model.modules():
        if "config" in vars(module):
            keep(module.config)
    for tensor in (*model.parameters(), *model.buffers()):
        keep(tensor)
    return copy.deepcopy(model, memo)
