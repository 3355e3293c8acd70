"""Train a layout and one process with the same calls, and measure how far they are apart, parameter by parameter."""

from __future__ import annotations

import copy
import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import am_fsdp
from training.degrees import Degrees
from training.layout import lay_out
from training.model import main_output
from verifying.conditions import CALLS, Condition, MeanOfAll, build_batch
from verifying.model import Subject, takes, vocabulary

RATE, LARGEST_NORM = 0.1, 1.0


def compare(
    subject: Subject,
    condition: Condition,
    degrees: Degrees,
    *,
    schedule: str,
    microbatch: int,
    sequences: int,
    length: int,
    device: torch.device,
    recompute: bool | str = False,
    compile_with: str | None = None,
) -> dict[str, float]:
    """The largest relative error of each loss, norm, gradient and weight that this rank holds, by name.

    Rank 0 alone trains the whole model, eagerly; every rank builds it once.

    Collectives: those of the layout, and one broadcast of each parameter's gradient per step, and of each weight.

    Raises:
        ValueError, TypeError, NotImplementedError: the model cannot be laid out so; what was refused, and why.
    """
    model = subject.build(condition.attention, condition.dtype, seed=0)
    _check(model, condition, degrees, sequences, microbatch, length)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    ids = vocabulary(model)
    one = _OneProcess(copy.deepcopy(model).to(device), condition) if dist.get_rank() == 0 else None
    meshes = degrees.meshes(device.type)
    local = sequences // degrees.dp
    loss_fn = MeanOfAll(local // microbatch * degrees.dp * degrees.cp)
    layout = lay_out(
        model,
        degrees,
        meshes,
        schedule=schedule,
        microbatch=microbatch,
        local_batch=local,
        device=device,
        loss_fn=loss_fn,
        mp_policy=condition.mp_policy,
        autocast=condition.autocast,
        recompute=recompute,
        compile_with=compile_with,
    )
    mine = degrees.rows(meshes[0], sequences)
    optimizers = [_optimizer(part) for part in layout.parts]
    errors: dict[str, float] = {}
    for number, word in enumerate(CALLS[condition.calls].split()):
        if word in ("step", "eval"):
            whole_batch = build_batch(condition.batch, sequences, length, ids, seed=number)
            ids_here, labels, inputs = _on(device, whole_batch)
            loss_fn.labelled = int((labels != -100).sum())
            do = layout.step if word == "step" else layout.evaluate
            loss = do(ids_here[mine], labels[mine], **{name: value[mine] for name, value in inputs.items()})
            expected = one.run(word, ids_here, labels, inputs) if one else None
            _keep_largest(errors, "loss", _error(_mean_over_world(loss, device), _from_first(expected, device), 0))
            if word == "step":
                found = _parameters(layout.parts, gradient=True)
                _compare_all(errors, "gradient of ", names, found, one.gradients() if one else {}, condition, device)
        elif word == "clip":
            named = [named for part in layout.parts for named in part.named_parameters()]
            norm = am_fsdp.clip_grad_norm_(
                named, LARGEST_NORM, pipeline_shards=degrees.pp, duplicates=layout.duplicates
            )
            expected = one.clip() if one else None
            _keep_largest(errors, "gradient norm", _error(norm, _from_first(expected, device), 0))
        else:
            for optimizer in optimizers + ([one.optimizer] if one else []):
                optimizer.step()
                optimizer.zero_grad()
    found = _parameters(layout.parts, gradient=False)
    _compare_all(errors, "weight ", names, found, one.weights() if one else {}, condition, device)
    return errors


class _OneProcess:
    """The whole model, trained on the whole batch."""

    def __init__(self, model: nn.Module, condition: Condition) -> None:
        self.model, self.condition = model, condition
        self.optimizer = _optimizer(model)
        self.loss_fn = MeanOfAll()
        caches = "use_cache" in inspect.signature(model.forward).parameters
        self.settings = {"use_cache": False} if caches else {}

    def run(self, word: str, ids: torch.Tensor, labels: torch.Tensor, inputs: dict) -> torch.Tensor:
        self.loss_fn.labelled = int((labels != -100).sum())
        dtype = self.condition.autocast
        with torch.set_grad_enabled(word == "step"), torch.autocast(ids.device.type, dtype, enabled=dtype is not None):
            loss = self.loss_fn(main_output(self._call(ids, inputs)), labels)
        if word == "step":
            loss.backward()
        return loss.detach()

    def clip(self) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM, foreach=False)

    def gradients(self) -> dict[str, torch.Tensor | None]:
        return {name: p.grad for name, p in self.model.named_parameters(remove_duplicate=False)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters(remove_duplicate=False)}

    def _call(self, ids: torch.Tensor, inputs: dict) -> object:
        if self.condition.mp_policy is None:
            return self.model(ids, **self.settings, **inputs)
        # As FSDP2 does: parameters are cast, buffers are not.
        cast = {name: p.to(torch.bfloat16) for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, cast, (ids,), self.settings | inputs)


def _check(
    model: nn.Module, condition: Condition, degrees: Degrees, sequences: int, microbatch: int, length: int
) -> None:
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    degrees.check(dist.get_world_size(), text, sequences, microbatch, length)
    wanted = {"padding": "attention_mask", "left-padding": "attention_mask", "packed": "position_ids"}
    needed = wanted.get(condition.batch)
    if needed and not takes(model, needed):
        raise ValueError(
            f"batch={condition.batch} needs {needed}, which {type(model).__name__}.forward does not take; use batch=ids"
        )


def _compare_all(
    errors: dict[str, float],
    what: str,
    names: list[str],
    found: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor | None],
    condition: Condition,
    device: torch.device,
) -> None:
    """Rank 0 shows what is right, name by name, and every rank that holds some of it looks."""
    largest = max((e.abs().max().item() for e in expected.values() if e is not None and e.numel()), default=0.0)
    floor = condition.floor * _from_first(torch.tensor(largest, dtype=torch.float64), device).item()
    for name in names:
        right = _from_first(expected.get(name), device)
        if name in found:
            actual = found[name]
            whole = actual.full_tensor() if isinstance(actual, DTensor) else actual
            if whole is None:
                whole = torch.zeros_like(right)
            elif right.shape != whole.shape and right.numel() == 1:
                right = torch.zeros_like(whole)  # one process gives it no gradient
            _keep_largest(errors, what + name, _error(whole, right, floor))


def _parameters(parts: list[nn.Module], gradient: bool) -> dict[str, torch.Tensor | None]:
    named = [pair for part in parts for pair in part.named_parameters(remove_duplicate=False)]
    return {name: p.grad if gradient else p.detach() for name, p in named if p.requires_grad}


def _from_first(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Rank 0's tensor on every rank; a zero where rank 0 has none."""
    described: list = [None]
    if dist.get_rank() == 0:
        tensor = torch.zeros(1, dtype=torch.float32) if tensor is None else tensor
        tensor = tensor.detach().to(device).contiguous()
        described = [(tuple(tensor.shape), tensor.dtype)]
    dist.broadcast_object_list(described, 0)
    if dist.get_rank():
        shape, dtype = described[0]
        tensor = torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(tensor, 0)
    return tensor


def _error(actual: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """Largest difference over the largest expected value, or over the floor; infinite where there is a NaN."""
    actual, expected = actual.detach().double(), expected.detach().double().reshape(actual.shape)
    if not expected.numel():
        return 0.0
    scale = max(expected.abs().max().item(), floor, 1e-30)
    error = (actual - expected).abs().max().item() / scale
    return error if error == error else float("inf")


def _keep_largest(errors: dict[str, float], name: str, error: float) -> None:
    errors[name] = max(error, errors.get(name, 0.0))


def _mean_over_world(loss: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    pair = torch.zeros(2, dtype=torch.float64, device=device)
    if loss is not None:
        pair += torch.stack([loss.double(), torch.ones_like(loss, dtype=torch.float64)])
    dist.all_reduce(pair)
    return pair[0] / pair[1]


def _on(device: torch.device, batch: tuple) -> tuple:
    ids, labels, inputs = batch
    return ids.to(device), labels.to(device), {name: value.to(device) for name, value in inputs.items()}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD: it moves every weight by as much as its gradient says, so that an error stays as large as it is."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE, foreach=False)
