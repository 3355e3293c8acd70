"""Context parallelism on a model: attention over the whole sequence while each rank holds a part of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from am_moe.context_parallel.batch import COUNTS, IGNORED, is_of_images, shard_batch, unshard_sequence
from am_moe.context_parallel.ends import cut_tokens, gather_tokens
from am_moe.context_parallel.heads import gather_heads, repeated_for, spread_heads
from am_moe.context_parallel.kernel import Scores
from am_moe.context_parallel.masks import ContextMask, Sequence, describe
from am_moe.context_parallel.mixers import Running, run_on_whole_sequences
from am_moe.context_parallel.nested import map_tensors, tensors_in
from am_moe.context_parallel.picked import cut_picked, picked_tokens
from am_moe.context_parallel.plan import Plan, Rule
from am_moe.context_parallel.prove import LABELS, Call, Proof, entering, prove
from am_moe.context_parallel.reading import Reading, UnprovenError
from am_moe.context_parallel.ring import shared_attention
from am_moe.context_parallel.rotary import show_whole_length, tables_by_length
from am_moe.context_parallel.support import (
    CONVOLUTIONS,
    check_supported,
    configs_besides_towers,
    configs_of,
    dropout_of_towers,
    engine_attention,
    is_part_of_pipeline,
    known_modules,
    mixers,
    registry_attention,
    towers,
)
from am_moe.context_parallel.transport import place
from am_moe.context_parallel.windows import UnknownMaskError, Window, contents, recognise

CommType = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
COMM_TYPES = get_args(CommType)
_PREFIX = "am_moe_context_parallel"
# What shard_batch adds, of which a forward may know nothing.
_OURS = frozenset({"num_labels_in_batch"})
# A forward is read with at most so many tokens, as masks that a model makes by itself are real.
_READABLE = 2**14
_numbers = itertools.count()


def apply_cp(
    model: nn.Module,
    cp_mesh: DeviceMesh,
    cp_comm_type: CommType = "p2p",
    *,
    example_inputs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Let a model's attention see the whole sequence while each rank of an axis holds a part of it, in place.

    The model's modules, names and parameters stay. Its config names an attention function of its own, registered with
    transformers beside the others, and a hook on its forward learns the positions of the whole sequence. Call it with
    what `shard_batch` returns. Gradients are right when averaged over the ranks of the axis, like those of data
    parallelism: shard or replicate the model over the flattened data and context axis.

    Args:
        model: a transformers model whose attention uses the registry, real or on the meta device; or one with
            Transformer Engine's `DotProductAttention`, which is given its context-parallel group.
        cp_mesh: the context axis. For `"a2a+p2p"` two axes: keys travel between the ranks of the first, heads are
            spread over those of the last.
        cp_comm_type: how keys reach queries. `"p2p"`: rank to rank, step by step; `"all_gather"`: all at once;
            `"a2a"`: each rank gets the whole sequence for some of the heads; `"a2a+p2p"`: both.
        example_inputs: a small batch as it is before `shard_batch`, with images and labels if there will be: calls like
            it are then read, and perhaps refused, here. Others are read when they come.

    Returns:
        The model.

    Images are turned into embeddings on every rank, whole, with the ids of all tokens (which are gathered), and cut
    where the stack begins; so are the positions that a model counts from images (M-RoPE). The gradients of the tower
    and of the embedding are then this rank's tokens' share, like every other.

    What of the model is not attention is read before the first forward of each form of calls (`prove.py`): it is exact
    on this rank's tokens, or on whole sequences where it has to see them, or refused. Logits that are per token are of
    this rank's tokens; what pools, or is a slice of the sequence, is whole and the same on every rank.

    Collectives: none here. In a forward, an all-gather of positions over `cp_mesh`, and where a model needs whole
        sequences before or behind its stack, one of each tensor concerned; in every attention those of
        `shared_attention` over the first axis and `spread_heads` over the last; in every linear attention, SSM and
        convolution those of `run_on_whole_sequences` over both.

    Raises:
        ValueError: an unknown type, a mesh with the wrong number of axes, heads that do not divide, a model whose
            tokens meet in other ways than attention; on every rank alike.
    """
    _check_mesh(cp_mesh, cp_comm_type)
    # The adapters of peft hand positions on without naming them; what they wrap names them.
    whole: Any = model
    model = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    engine = engine_attention(model)
    if registry_attention(model) or not engine:
        check_supported(model)
        configs = configs_besides_towers(model)
        _check_configs(type(model).__name__, configs, cp_mesh, cp_comm_type)
        context = _Context(model, cp_mesh, cp_comm_type)
        name, before = _register(context), [(config, config._attn_implementation) for config in configs_of(model)]
        try:
            for config in configs:
                config._attn_implementation = name
            for config, implementation in before:  # a config sets those of towers within it, too
                if all(config is not ours for ours in configs):
                    config._attn_implementation = implementation
            context.prove(model, context.tokens_alone())
            if example_inputs is not None:
                context.proven(model, (), shard_batch(example_inputs, cp_mesh))
                context.images = None
        except ValueError:
            for config, implementation in before:
                config._attn_implementation = implementation
            raise
        if stack := context.known.stack:
            model.get_submodule(stack).register_forward_pre_hook(context.before_stack, with_kwargs=True)
            model.get_submodule(stack).register_forward_hook(context.after_stack, prepend=True)
        for table in tables_by_length(model):
            show_whole_length(table, context.last_position)
        for inner, module in mixers(model):
            run_on_whole_sequences(module, inner, cp_mesh, context.running)
        for _, tower in towers(model):
            for module in tower.modules():
                if isinstance(module, CONVOLUTIONS):
                    module.register_forward_pre_hook(context.before_convolution)
        if hasattr(model, "generate"):
            model.generate = functools.partial(_refuse_to_generate, type(model).__name__)
        model.register_forward_pre_hook(context.before_forward, with_kwargs=True)
        model.register_forward_hook(context.after_forward, always_call=True)
    for _, module in engine:
        _set_engine_group(module, cp_mesh, cp_comm_type)
    return whole


def _refuse_to_generate(name: str, *_args: Any, **_kwargs: Any) -> None:
    raise RuntimeError(
        f"{name} cannot generate under context parallelism, which is for training: a new token is in no rank's part "
        "of the sequence. Lay it out without, or write a folder (am_fsdp.save_hf_weights) and generate from it"
    )


class _Context:
    """What the attention function, the mask function and the hooks of one model share."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, comm_type: str) -> None:
        self.name, self.mesh, self.comm_type = type(model).__name__, mesh, comm_type
        heads = comm_type in ("a2a", "a2a+p2p")
        self.heads_group = mesh.get_group(mesh.ndim - 1) if heads else None
        self.ring_group = None if comm_type == "a2a" else mesh.get_group(0)
        self.parameters = inspect.signature(model.forward).parameters
        self.names_all = all(p.kind is not p.VAR_KEYWORD for p in self.parameters.values())
        self.parts: Any = None  # positions and padding of a forward
        self.sequence: Sequence | None = None  # what they say together with those of the other ranks
        self.known = known_modules(model)
        self.reading: Reading | None = None  # while the model's code is read
        self.windows: dict[tuple, Window] = {}  # of masks by what their functions do, and the length
        self.proofs: dict[tuple, Proof] = {}  # by the form of the call
        self.proof: Proof | None = None  # of the forward that runs
        self.labels: dict[str, Any] = {}  # and its labels and their counts
        self.images: tuple[nn.Module, Call] | None = None  # what that forward's proof was made of, if it has images
        self.with_others = False  # or with what a tower may take, and is no image

    def __deepcopy__(self, memo: dict[int, Any]) -> _Context:
        """A copy of the model shares it: groups cannot be copied, and both copies' configs name these functions."""
        return self

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Check a call, and keep what its masks depend on."""
        given, parts, proof = self.proven(model, args, kwargs)
        shape = tuple(parts[0].shape)
        by_tokens = self._call(given, shape, False).by_tokens
        self.with_others = any(_has_axes(x) and n not in by_tokens and not is_of_images(n) for n, x in given.items())
        self.parts, self.sequence, self.proof = parts, None, proof
        return (), self._divided(given, shape, proof)

    def proven(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor | None], Proof | None]:
        """What a call gives, the positions and padding `(B, n)` of this rank's part, and in which way it is exact."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if positions is None or tokens is None:
            raise ValueError(f"{self.name} under context parallelism needs position_ids; call it with shard_batch(...)")
        if given.get("use_cache") or given.get("past_key_values") is not None:
            raise ValueError("context parallelism is for training: use_cache and past_key_values are not supported")
        shape = tuple(tokens.shape[:2])
        if tuple(positions.shape) not in (shape, (1, shape[1])) or shape[1] % 2:
            raise ValueError(
                f"position_ids of shape {tuple(positions.shape)} for {shape[0]} x {shape[1]} tokens: a rank's part has "
                "an even number of tokens and a position for each; use shard_batch(...)"
            )
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(f"attention_mask must be {shape}, 1 for tokens and 0 for padding; got {tuple(mask.shape)}")
        # With a mask, transformers does not look for documents in this rank's positions, which jump between chunks.
        if mask is None and "attention_mask" in self.parameters:
            given["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=tokens.device)
        if "use_cache" in self.parameters:
            given["use_cache"] = False
        self.labels = {name: given[name] for name in (*LABELS, *COUNTS.values()) if name in given}
        given = {n: x for n, x in given.items() if n in self.parameters or not (self.names_all or n in _OURS)}
        call, self.images = self._call(given, shape, mask is not None), None
        if any(is_of_images(name) and x is not None for name, x in given.items()):
            if not self.known.stack or given.get("input_ids") is None or is_part_of_pipeline(model):
                raise ValueError(f"{self.name} takes images under context parallelism whole, with input_ids, only")
            if model.training and (draws := dropout_of_towers(model, self.known.stack)):
                raise ValueError(
                    f"{self.name} has dropout in {draws}, which every context rank runs whole and would draw "
                    "differently; set it to 0"
                )
            by_ids, call = self._calls_with_images(model, given, shape, mask is not None)
            self.images = model, call
            if self.prove(model, by_ids) != self.prove(model, call):
                raise ValueError(
                    f"{self.name} treats tokens in one way by their ids and in another by embeddings, so what it does "
                    "with images is not known; context parallelism is right for its text only"
                )
            if _positions_of_images(model):
                given["position_ids"] = None  # the model makes them of the whole batch
        return given, (positions.expand(shape), mask), self.prove(model, call)

    def _call(self, given: dict[str, Any], shape: tuple[int, int], padded: bool) -> Call:
        by_tokens = {
            name for name, x in given.items()
            if not is_of_images(name) and isinstance(x, torch.Tensor) and x.dim() > 1
            and x.shape[1] == shape[1] and x.shape[0] in (1, shape[0])
            and (name not in LABELS or not x.is_floating_point())
        }  # fmt: skip
        return Call(given, frozenset(by_tokens), *shape, self.mesh.size(), padded)

    def _calls_with_images(self, model: Any, given: dict[str, Any], shape: tuple[int, int], padded: bool) -> list[Call]:
        """A call with images as the rest of the model sees it: with whole ids, and with the embeddings made of them."""
        of_images = {"mm_token_type_ids", "token_type_ids"} if (axes := _positions_of_images(model)) else set()
        rest = {n: x for n, x in given.items() if n not in of_images and not is_of_images(n)}
        if axes:
            rest["position_ids"] = torch.empty(axes, *shape, dtype=torch.int64, device="meta")
        weight = model.get_input_embeddings().weight
        embeddings = {"inputs_embeds": torch.empty(*shape, weight.shape[-1], dtype=weight.dtype, device="meta")}
        by_embeddings = {n: x for n, x in rest.items() if n != "input_ids"} | embeddings
        calls = [self._call(arguments, shape, padded) for arguments in (rest, by_embeddings)]
        return [dataclasses.replace(call, with_images=True) for call in calls]

    def tokens_alone(self) -> Call:
        """The least that a forward can be given."""
        ids = torch.ones(1, 12, dtype=torch.int64)
        given = {"input_ids": ids, "attention_mask": ids, "position_ids": ids, "use_cache": False}
        given = {name: x for name, x in given.items() if name in self.parameters}
        return self._call(given, (1, 12), padded=False)

    @torch.compiler.disable
    def prove(self, model: nn.Module, call: Call) -> Proof | None:
        """In which way a call is exact, found once for each form of calls; None for a part of a pipeline."""
        if is_part_of_pipeline(model):
            return None
        proof = self._read(model, call)
        if proof.holds_for(call):
            return proof
        if call.tokens * call.ranks > _READABLE:
            raise ValueError(
                f"context parallelism is not right for {self.name}: it decides by how many tokens there are, and "
                f"{call.tokens * call.ranks} are too many to read what it does with them"
            )
        return self._read(model, dataclasses.replace(call, at_length=True))

    def _read(self, model: nn.Module, call: Call) -> Proof:
        gradients = torch.is_grad_enabled()
        form = (call.form(), model.training, gradients)
        if form not in self.proofs:
            # In inference mode torch hands operators on as they are called, for which there are no rules.
            with torch.inference_mode(False), torch.set_grad_enabled(gradients):
                self.proofs[form] = prove(model, self.known, call, self._watched)
        return self.proofs[form]

    def _watched(self, reading: Reading | None) -> None:
        self.reading = reading

    def _divided(self, given: dict[str, Any], shape: tuple[int, int], proof: Proof | None) -> dict[str, Any]:
        """What this rank's forward takes: its tokens, or whole sequences where those are needed."""
        if proof is None:
            return given
        by_tokens = self._call(given, shape, False).by_tokens
        for name in sorted(by_tokens):  # in one order on every rank, as each is a collective
            if proof.way.whole_labels if name in LABELS else proof.way.whole_inputs:
                given[name] = gather_tokens(given[name], self.mesh)
        if proof.counted and given.get("num_items_in_batch") is not None:
            count = self.labels.get(COUNTS[proof.counted])
            if count is None:
                raise ValueError(f"{self.name} sums losses over {proof.counted}; count them with shard_batch(...)")
            given["num_items_in_batch"] = count * (self.mesh.size() if proof.way.whole_labels else 1)
        if proof.means and self.labels.get(COUNTS[proof.counted]) is None:
            raise ValueError(f"{self.name} averages losses over {proof.counted}; count them with shard_batch(...)")
        return given

    def after_forward(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Weigh means over this rank's labels by their number, so that they average to the mean over all."""
        proof, self.parts, self.sequence, self.proof, self.images = self.proof, None, None, None, None
        if output is None or proof is None or not proof.means:
            return None
        here = (self.labels[proof.counted] != IGNORED).sum()
        share = here / self.labels[COUNTS[proof.counted]]
        places = itertools.count()

        def weighed(tensor: torch.Tensor) -> torch.Tensor:
            # The mean over no labels is no number.
            return tensor.nan_to_num() * share.to(tensor.dtype) if next(places) in proof.means else tensor

        return map_tensors(output, weighed)

    def before_stack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Cut what enters the stack whole."""
        if self.proof is None or not any(self.proof.cuts):
            return None
        picked: dict[str, Any] = {}
        if self.images is not None:
            picked = self._picked(args, kwargs, self.proof, *self.images)
            kwargs = {name: x for name, x in kwargs.items() if name not in picked}
        cuts = iter(self.proof.cuts)

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            return cut_tokens(tensor, self.mesh, dim) if (dim := next(cuts)) else tensor

        return map_tensors(args, cut), map_tensors(kwargs, cut) | picked

    def _picked(self, args: tuple, kwargs: dict[str, Any], proof: Proof, model: Any, call: Call) -> dict[str, Any]:
        """What enters the stack for some tokens of images, for this rank's; all else has to be what was proven."""
        names = {name for name, *_ in proof.entering}
        more = {name: x for name, x in kwargs.items() if name not in names and any(True for _ in tensors_in(x))}
        rest = {name: x for name, x in kwargs.items() if name not in more}
        shape = len(self.parts[0]), self.whole_sequence().seq_len
        picked = picked_tokens(more, shape) if more else None
        if entering(args, rest) != proof.entering or (more and picked is None):
            others = ", ".join(more) or "something else"
            raise ValueError(
                f"{self.name} gives its layers {others} where there are images, which context parallelism cannot cut "
                "along the sequence; train it with text, or with no context axis"
            )
        if picked is None:
            return {}
        if self.prove(model, dataclasses.replace(call, picked=picked)) != proof:
            raise ValueError(f"{self.name} returns something else where there are {', '.join(more)}")
        return cut_picked(picked, self.mesh)

    def after_stack(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Make whole what is read whole behind the stack."""
        if self.proof is None or not any(self.proof.gathers):
            return None
        parts = iter(self.proof.gathers)

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if (part := next(parts)) is None else gather_tokens(tensor, self.mesh, part)

        return map_tensors(output, gather)

    def mask(self, *, mask_function: Callable, device: torch.device, local_size: int | None = None, **settings: Any):
        """The mask interface's entry: a description for the layers of one kind."""
        does, tensors = contents(mask_function)
        if self.reading is not None:
            if any(self.reading.state(tensor) is not None for tensor in tensors):
                raise UnprovenError("makes its attention mask of more than positions")
            if tensors:
                return ContextMask(Plan((), Rule()), None, None)
            with self.reading.unseen():
                window = recognise(mask_function, 1, 3 * (local_size or 8), torch.device("cpu"))
            return ContextMask(Plan((), Rule(window.before)), None, None)
        self._check_called()
        sequence = self.whole_sequence()
        known = does is not None and not tensors
        if not known and settings.get("q_length", sequence.seq_len) != sequence.seq_len:
            raise UnknownMaskError(f"{self.name} makes its attention mask of one rank's tokens")
        form = does, sequence.seq_len
        if not known or form not in self.windows:
            rows = 1 if known else len(self.parts[0])
            window = recognise(mask_function, rows, sequence.seq_len, torch.device(device))
            if not known:
                return sequence.mask(window)
            self.windows[form] = window
        return sequence.mask(self.windows[form])

    def before_convolution(self, module: nn.Module, args: tuple) -> None:
        """Towers run whole on images, and on made-up ones where other ranks have images; nothing else is whole."""
        if self.parts is not None and self.with_others and self.images is None:
            raise ValueError(
                f"a convolution ({type(module).__name__}) of an image or audio tower ran: what it becomes is not cut "
                "along the sequence; context parallelism is for batches of text and images"
            )

    def running(self) -> Running | None:
        """The forward that runs; None in a recomputation, whose hooks know nothing of it."""
        if self.parts is None:
            return None
        return Running(*self.parts[0].shape, padded=self.whole_sequence().valid_BN is not None)

    def last_position(self) -> torch.Tensor:
        """What rotary tables that depend on the length are shown."""
        self._check_called()
        return self.whole_sequence().last_position

    def whole_sequence(self) -> Sequence:
        """What all ranks' parts say together; gathered once in a forward, over the context axis."""
        if self.sequence is None:
            (positions, mask), ranks = self.parts, place(self.ring_group)[1]
            if mask is None:
                self.sequence = describe(unshard_sequence(positions, self.mesh), None, ranks)
            else:
                both = unshard_sequence(torch.stack([positions, mask.to(positions.dtype)]), self.mesh, dim=2)
                self.sequence = describe(both[0], both[1].bool(), ranks)
        return self.sequence

    def _check_called(self) -> None:
        if self.parts is None:
            raise ValueError(f"call the {self.name} that apply_cp was given, not a part of it")

    @torch.compiler.disable
    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The attention registry's entry."""
        where = type(module).__name__
        if not isinstance(attention_mask, ContextMask):
            kind = "no mask" if attention_mask is None else f"a {type(attention_mask).__name__}"
            raise ValueError(f"{where} got {kind} that transformers' mask interface did not make; it cannot be cut")
        if attention_mask.plan.rule.before == -1:  # a window of 0, as configs have for layers that no model has
            raise ValueError(f"{where} has a mask under which a token sees none, nor itself")
        if kwargs.get("position_bias") is not None:
            raise ValueError(f"{where} adds a position bias to its scores, which context parallelism does not know")
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"{where} has {query.shape[2]} queries for {key.shape[2]} keys; it must be self-attention")
        if self.reading is not None:
            return self.reading.attention(query, key, value, s_aux), None
        if dropout:
            raise ValueError(
                f"{where} has attention dropout {dropout}, which context parallelism does not have; set it to 0"
            )
        query, key, value = _cast(query, key, value)
        if self.heads_group is not None:
            rank, ranks = place(self.heads_group)
            _check_heads(where, query.shape[1], ranks)
            times = repeated_for(key.shape[1], ranks)
            key, value = (x.repeat_interleave(times, 1) if times > 1 else x for x in (key, value))
            query, key, value = spread_heads([query, key, value], self.heads_group)
            s_aux = None if s_aux is None else s_aux.chunk(ranks)[rank]
        mask = attention_mask
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        groups = mask.query_groups_BN, mask.key_groups_BN, mask.reach_BN, mask.rows
        scores = Scores(mask.plan.rule, scale, softcap, *groups)
        gather = self.comm_type == "all_gather"
        out = shared_attention(query, key, value, s_aux, scores, mask.plan, self.ring_group, gather)
        if self.heads_group is not None:
            out = gather_heads(out, self.heads_group)
        return out.transpose(1, 2).contiguous(), None


def _cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Under autocast, attention is computed in its dtype, as torch's own is."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype is torch.float64:
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _register(context: _Context) -> str:
    """Add this context's functions to transformers' registries under a name of their own."""
    transformers = importlib.import_module("transformers")  # whose model this is
    name = f"{_PREFIX}_{next(_numbers)}"
    transformers.AttentionInterface.register(name, context.attention)
    transformers.AttentionMaskInterface.register(name, context.mask)
    return name


def _has_axes(value: Any) -> bool:
    return value.dim() > 1 if isinstance(value, torch.Tensor) else isinstance(value, (list, tuple, dict))


def _positions_of_images(model: nn.Module) -> int:
    """How many positions a token has where the model counts them from its images (M-RoPE); 0 for one of the text's."""
    return 3 if any(hasattr(module, "get_rope_index") for module in model.modules()) else 0


def _check_mesh(mesh: DeviceMesh, comm_type: str) -> None:
    if comm_type not in COMM_TYPES:
        raise ValueError(f"cp_comm_type must be one of {', '.join(COMM_TYPES)}; got {comm_type!r}")
    axes = 2 if comm_type == "a2a+p2p" else 1
    if mesh.ndim != axes:
        fix = (
            "init_device_mesh(device, (p2p, a2a), mesh_dim_names=('cp_p2p', 'cp_a2a')), with ranks of one node along "
            "the last"
            if axes == 2
            else "an axis of it such as mesh['cp']"
        )
        raise ValueError(f"cp_comm_type={comm_type!r} needs a cp_mesh of {axes} axes, got {mesh.ndim}; pass {fix}")
    if any((mesh.mesh.diff(dim=axis) < 0).any() for axis in range(mesh.ndim)):
        raise ValueError(
            f"cp_mesh must list its ranks in ascending order, as their groups do; got {mesh.mesh.tolist()}"
        )


def _check_configs(name: str, configs: list[Any], mesh: DeviceMesh, comm_type: str) -> None:
    for config in configs:
        if str(config._attn_implementation).startswith(_PREFIX):
            raise ValueError(f"{name} is context-parallel already; apply_cp is called once")
        heads = getattr(config, "num_attention_heads", None)
        if comm_type in ("a2a", "a2a+p2p") and isinstance(heads, int):
            _check_heads(name, heads, mesh.size(mesh.ndim - 1))


def _check_heads(name: str, heads: int, ranks: int) -> None:
    if heads % ranks:
        fits = [d for d in range(1, heads + 1) if heads % d == 0]
        raise ValueError(
            f"the {heads} attention heads of {name} do not divide over {ranks} ranks of all-to-all; an axis can have "
            f"{fits}, or use cp_comm_type='p2p'"
        )


def _set_engine_group(module: Any, mesh: DeviceMesh, comm_type: str) -> None:
    """What Transformer Engine documents: the group (or those of heads and of keys), its ranks, a stream, the type."""
    groups = [mesh.get_group(axis) for axis in reversed(range(mesh.ndim))]
    ranks = mesh.mesh.flatten().tolist() if mesh.ndim > 1 else dist.get_process_group_ranks(groups[0])
    stream = torch.get_device_module(mesh.device_type).Stream()
    module.set_context_parallel_group(groups if mesh.ndim > 1 else groups[0], ranks, stream, cp_comm_type=comm_type)
