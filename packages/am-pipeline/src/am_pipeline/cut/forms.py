"""Forms of input: which inputs a model is called with, and which dim of each is the batch.

A dim is never told by its size alone. Where it could be the batch, the model is traced with each way to read it, on
other numbers of sequences and tokens than the real batch has: a wrong way does not fit the other inputs and fails. What
remains ambiguous is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from am_pipeline.cut.crossing import BATCH, DECODER_SEQUENCE, IMAGES, SEQUENCE, Dim, Shape, Sizes
from am_pipeline.step.inputs import DECODER_IDS, ENCODER_INPUTS, decoder_length

# Sequences and tokens of the two runs that tell a tensor's dims apart; where a decoder has its own, its tokens too.
SIZES = ((3, 8), (5, 16))
DECODER_SIZES = ((3, 8, 6), (5, 16, 18))
# A third, to see that lengths are not rounded up.
ODD = (2, 11, 7)


@dataclass(frozen=True, eq=False)
class Given:
    """One input of a model, at any size: its name, its dims and how its numbers look."""

    name: str
    shape: Shape
    sample: torch.Tensor

    def at(self, sizes: Sizes) -> torch.Tensor:
        tensor = self.sample
        for dim, size in enumerate(self.shape.at(sizes)):
            if size != (there := tensor.shape[dim]):
                places = torch.arange(size, device=tensor.device)
                # The last of a row stays the last: padding is there. One more than there are is the last once more.
                if size == there + 1:
                    places = places.clamp(max=max(there - 1, 0))
                else:
                    places = places % max(there, 1) if size > there else (places + 1) * there // size - 1
                tensor = tensor.index_select(dim, places)
        return tensor

    @property
    def is_mask(self) -> bool:
        """Whether its numbers are zeros and ones alone, or none are."""
        return not self.sample.is_floating_point() and bool(((self.sample == 0) | (self.sample == 1)).all())

    def filled(self, hides: bool) -> Given:
        """A mask of ones, or of ones between zeros: code often leaves out a mask of ones."""
        ones = torch.ones_like(self.sample)
        if hides and ones.dim() and ones.shape[-1] > 2:
            ones[..., 0] = ones[..., -1] = 0
        return replace(self, sample=ones)

    def of(self, sample: torch.Tensor) -> Given:
        """Another tensor of the same dims, whose fixed ones may have other sizes."""
        pairs = zip(self.shape.dims, sample.shape, strict=False)
        return Given(self.name, Shape(tuple(dim if isinstance(dim, Dim) else size for dim, size in pairs)), sample)

    @property
    def fixed(self) -> tuple[int, ...]:
        """The sizes of its dims that are neither the batch nor a sequence."""
        return tuple(dim for dim in self.shape.dims if not isinstance(dim, Dim))

    @property
    def batch_dim(self) -> int | None:
        return next((i for i, dim in enumerate(self.shape.dims) if dim == BATCH), None)


@dataclass(frozen=True, eq=False)
class Form:
    """What a model is called with.

    Attributes:
        first: its first argument.
        tensors: further inputs that are tensors.
        others: further inputs that are not.
        training: whether the model is in training mode.
        sizes: at which it can be traced; two, or the one of the real batch.
    """

    first: Given
    tensors: Mapping[str, Given] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False
    sizes: tuple[Sizes, ...] = SIZES

    @property
    def batch_dims(self) -> dict[str, int | None]:
        """The batch dim of every further tensor; None where it goes to every microbatch whole."""
        return {name: given.batch_dim for name, given in self.tensors.items()}

    @property
    def with_more_images(self) -> Form:
        """Twice the sequences, each with its images, and a token more: a second size, beside that of the real batch.

        Inputs that are of no sequence are of images, however many there are of each: patches, sizes, grids.
        """
        images = next((given for name, given in self.tensors.items() if name in ENCODER_INPUTS), None)
        if images is None or len(self.sizes) > 1 or len(self.sizes[0]) > 2:
            return self
        count = images.sample.shape[0]

        def growing(given: Given) -> Given:
            dims = given.shape.dims
            if not dims or any(isinstance(dim, Dim) for dim in dims):
                return given
            first = replace(IMAGES, factor=Fraction(dims[0], count))
            return Given(given.name, Shape((first, *dims[1:])), given.sample)

        batch, length = self.sizes[0]
        sizes = (batch, length, 0, count), (2 * batch, length + 1, 0, 2 * count)
        return replace(self, tensors={n: growing(given) for n, given in self.tensors.items()}, sizes=sizes)


class Piece:
    """An input of one microbatch, given by itself: it is not split."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class AmbiguousError(ValueError):
    """An input could be split in more than one way, or in none."""


def text_form(name: str, training: bool, decoder_ids: bool = False) -> Form:
    """Ids alone, or ids of an encoder and of a decoder."""
    ids = torch.arange(15).view(3, 5) % 7 + 1
    given = Given(name, Shape((BATCH, SEQUENCE)), ids)
    if not decoder_ids:
        return Form(given, training=training)
    more = {DECODER_IDS: Given(DECODER_IDS, Shape((BATCH, DECODER_SEQUENCE)), ids + 1)}
    return Form(given, more, training=training, sizes=DECODER_SIZES)


def features_form(name: str, width: int, dtype: torch.dtype, training: bool) -> Form:
    """Vectors of features alone, one for each token."""
    return Form(Given(name, Shape((BATCH, SEQUENCE, width)), torch.zeros(1, 1, width, dtype=dtype)), training=training)


def example_forms(
    name: str, example: Mapping[str, Any], read_of: Callable[[Form], set[str]], *, training: bool
) -> Iterator[Form]:
    """The forms that inputs may have that a user shows, as a processor gives them.

    The second dim of the model's first argument is its sequence, or of features and pixels a fixed size.

    Raises:
        ValueError: the model's first argument is not among them, or has no batch and sequence dim.
    """
    first = example.get(name)
    if not isinstance(first, torch.Tensor) or first.dim() < 2:
        raise ValueError(f"example_inputs must have {name!r}, a tensor of shape (B, S, ...); it has {sorted(example)}")
    rest = {key: value for key, value in example.items() if key != name}
    ambiguous: AmbiguousError | None = None
    for dims in ((BATCH, SEQUENCE), *(((BATCH, first.shape[1]),) if first.is_floating_point() else ())):
        given = Given(name, Shape((*dims, *first.shape[2:])), first)
        try:
            sizes = first.shape[0], first.shape[1]
            yield (
                resolve_form(given, rest, *sizes, read_of, training=training, batch_dims={})
                if rest
                else Form(given, training=training)
            )
        except AmbiguousError as error:
            ambiguous = ambiguous or error
    if ambiguous is not None:
        raise ambiguous


def resolve_form(
    first: Given,
    inputs: Mapping[str, Any],
    batch: int,
    seq_len: int,
    read_of: Callable[[Form], set[str]],
    *,
    training: bool,
    batch_dims: Mapping[str, int | None],
    pieces: int = 1,
    place: int = 0,
) -> Form:
    """The form of a batch, found by trying.

    Args:
        first: the model's first argument.
        inputs: its further inputs, whole, or a `Piece` for one microbatch.
        batch, seq_len: sequences and tokens of the batch.
        read_of: traces the model with a form; the inputs that it read, or whatever its forward raised.
        training: whether the model is in training mode.
        batch_dims: what the user says of the inputs' batch dims.
        pieces, place: microbatches of the batch, and which of them the pieces are for, where the real batch has to be
            traced.

    Raises:
        AmbiguousError: names an input and what it could be.
    """
    given_pieces = {name: value.tensor for name, value in inputs.items() if isinstance(value, Piece)}
    tensors = {n: value for n, value in inputs.items() if isinstance(value, torch.Tensor)} | given_pieces
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    others = {name: value for name, value in inputs.items() if name not in tensors}
    lengths = (seq_len, *decoder_length(tensors))
    options = {
        name: list(_options(name, value, batch // pieces if name in given_pieces else batch, lengths, batch_dims))
        for name, value in tensors.items()
    }
    of_text = {name: shapes for name, shapes in options.items() if name not in ENCODER_INPUTS}
    splits = pieces > 1 and batch > pieces

    known = DECODER_SIZES if len(lengths) > 1 else SIZES
    failures: list[Exception] = []

    def runs(form: Form) -> set[str] | None:
        try:
            return read_of(form)
        except Exception as error:  # whatever the model's own code raises
            failures.append(error)
            return None

    def small(choice: Mapping[str, Shape], sizes: tuple[Sizes, ...] = known) -> Form:
        return Form(first, {n: Given(n, shape, tensors[n]) for n, shape in choice.items()}, others, training, sizes)

    def masked(form: Form) -> Form:
        given = {n: g.filled(hides=True) if g.is_mask else g for n, g in form.tensors.items()}
        return replace(form, tensors=given)

    def larger(choice: Mapping[str, Shape]) -> Form:
        """More sequences than the batch has, and than tokens: code that looks up a row for each runs out of others."""
        return masked(small(choice, ((batch + 8, batch + 3, batch + 5),)))

    def real(choice: Mapping[str, Shape]) -> Form:
        """The microbatch itself: what must fit each other in number, images and their places, does."""

        def piece(given: Given) -> Given:
            dim = given.batch_dim
            whole = dim is None or given.name in given_pieces
            sample = given.sample if whole else given.sample.chunk(pieces, dim)[place]
            pairs = zip(given.shape.dims, sample.shape, strict=True)
            told = (BATCH,) if given.name in ENCODER_INPUTS else (BATCH, SEQUENCE)
            return Given(given.name, Shape(tuple(d if d in told else size for d, size in pairs)), sample)

        ids = piece(first)
        sizes = ((ids.sample.shape[0], *lengths),)
        given = {n: piece(Given(n, shape, tensors[n])) for n, shape in choice.items()}
        return Form(ids, given, others, training, sizes)

    def resolve(
        fixed: Mapping[str, Shape],
        free: Mapping[str, list[Shape]],
        make: Callable[[Mapping[str, Shape]], Form],
        again: Callable[[Mapping[str, Shape]], Form],
    ) -> dict[str, Shape] | None:
        """The first choice that runs with `make`, if no other batch dim of an input that it reads runs with `again`."""
        found = _first_that_runs(free, lambda choice: runs(make({**fixed, **choice})))
        if found is None:
            return None
        choice, read = found
        for name in sorted(read & set(free) - set(given_pieces)) if splits else ():
            for other in free[name]:
                changed = {**fixed, **choice, name: other}
                if name in _A_ROW_EACH and _batch_of(choice[name]) == 0 and isinstance(other.dims[0], int):
                    continue
                if _batch_of(other) != _batch_of(choice[name]) and runs(again(changed)) is not None:
                    raise AmbiguousError(
                        f"the input {name!r} of shape {tuple(tensors[name].shape)} could be split along "
                        f"{_along(choice[name])} or {_along(other)}: the model runs either way; say which with "
                        f"batch_dims={{{name!r}: ...}}"
                    )
        return choice

    choice = resolve({}, of_text, small, larger)
    if choice is not None and len(of_text) == len(options):
        return small(choice)
    rest = {name: shapes for name, shapes in options.items() if choice is None or name not in choice}
    more = resolve(choice or {}, rest, real, real)
    if more is not None:
        return real({**(choice or {}), **more})
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    why = f"; at last: {type(failures[-1]).__name__}: {failures[-1]}" if failures else ""
    raise AmbiguousError(
        f"the model does not run on inputs of shapes {shapes} beside {first.name} of {(batch, seq_len)}, "
        f"however their dims are read{why}; if one has a batch dim that is not found, say which with batch_dims="
    ) from (failures[-1] if failures else None)


# Inputs that transformers documents as a row for each sequence. Code that looks up the rows of a microbatch in one of
# these would also run on that of the whole batch, and read the first rows for every microbatch.
_A_ROW_EACH = {"attention_mask", "decoder_attention_mask", "token_type_ids", "mm_token_type_ids"}


def _first_that_runs(
    options: Mapping[str, list[Shape]], runs: Callable[[dict[str, Shape]], set[str] | None]
) -> tuple[dict[str, Shape], set[str]] | None:
    for shapes in itertools.islice(itertools.product(*options.values()), 32):
        choice = dict(zip(options, shapes, strict=True))
        read = runs(choice)
        if read is not None:
            return choice, read
    return None


def _options(
    name: str, value: torch.Tensor, batch: int, lengths: Sizes, batch_dims: Mapping[str, int | None]
) -> Iterator[Shape]:
    """Every way to read a tensor's dims, the likeliest first."""
    sequences = list(zip((SEQUENCE, DECODER_SEQUENCE), lengths, strict=False))
    if name.startswith("decoder_"):
        sequences.reverse()
    if name == DECODER_IDS:
        yield Shape((BATCH, DECODER_SEQUENCE, *value.shape[2:]))
        return
    could = [
        [dim for dim, there in ((BATCH, batch), *sequences, (size, size)) if there == size]
        if size > 1
        else [BATCH, size]
        if size == batch
        else [size]
        for size in value.shape
    ]
    for dims in itertools.product(*could):
        places = [i for i, dim in enumerate(dims) if dim == BATCH]
        if len(places) <= 1 and (name not in batch_dims or (places or [None])[0] == batch_dims[name]):
            yield Shape(dims)


def _batch_of(shape: Shape) -> int | None:
    return next((i for i, dim in enumerate(shape.dims) if dim == BATCH), None)


def _along(shape: Shape) -> str:
    dim = _batch_of(shape)
    return "no dim" if dim is None else f"dim {dim}"
