"""Let torch.compile take each layer of a laid-out model by itself, as the packages are tested."""

from __future__ import annotations

from torch import nn


def compile_layers(part: nn.Module, backend: str) -> None:
    """Compile every layer of the stacks of a model or of a pipeline part, in place; the first step is then slow.

    Call it when the model is laid out: collectives stay outside of the graphs, or are part of them, as each layer has
    them. A layer compiles by itself and not the model, since what is between the layers of a pipeline or of FSDP2 ends
    a graph anyway.

    Args:
        part: layers in `ModuleList`s; those in lists within a layer, such as experts, belong to the layer.
        backend: one of `torch.compiler.list_backends()`.

    Raises:
        ValueError: there is no layer.
    """
    layers = _layers(part)
    if not layers:
        raise ValueError(f"--compile: {type(part).__name__} has no list of layers to compile")
    for layer in layers:
        layer.compile(backend=backend)


def _layers(module: nn.Module) -> list[nn.Module]:
    found = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [layer for layer in child if any(True for _ in layer.parameters())]
        else:
            found += _layers(child)
    return found
