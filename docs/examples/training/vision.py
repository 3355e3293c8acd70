"""Models that take images with text: small random ones by their type, and which of their weights are a tower's."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import nn

from training.text import VOCABULARY
from verifying.shrink import shrink

_IMAGE_TOKEN = ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_token_id")
_OF_TEXT = ("pad_token_id", "bos_token_id", "eos_token_id")


def build_vision_config(name: str, size: int) -> Any:
    """A config of a model type (`qwen2_5_vl`, `gemma3`, …) at a small size, or of a local folder as it is.

    Args:
        name: a model type of `AutoModelForImageTextToText`, or a folder with a `config.json`.
        size: multiplies the widths, of text and tower alike, and the number of heads.

    Raises:
        ValueError: neither a folder nor such a model type; it has no room for bytes and the tokens of images.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if os.path.isdir(name):
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    else:
        try:
            config = AutoConfig.for_model(name)
        except ValueError:
            raise ValueError(f"--config {name!r} is neither a folder nor a transformers model type") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(f"--images: transformers has no model of images and text for {name!r}; leave --images out")
    if not os.path.isdir(name):
        config = _small(config, size)
    if image_token(config) < VOCABULARY:
        raise ValueError(f"--config {name!r} has {image_token(config)} for images, which is a byte; bytes are 0 to 255")
    return config


def image_token(config: Any) -> int:
    """The id that stands for a part of an image in a text.

    Raises:
        ValueError: the config names none.
    """
    for name in _IMAGE_TOKEN:
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    raise ValueError(f"--images: the config of {config.model_type} names no token that stands for images")


def freeze_towers(model: Any) -> None:
    """Train nothing of the modules that see images, in place; what joins them to the text is trained.

    Raises:
        ValueError: transformers does not say which module that is.
    """
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else model
    if tower is model or tower is model.base_model:
        raise ValueError(f"--freeze-tower: {type(model).__name__} does not say which of its modules sees images")
    tower.requires_grad_(False)


def one_image(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The inputs that are one image for a model, with random pixels, and how many tokens stand for it.

    Found by trying: a grid of patches, or pixels of one image, with its size where the model takes that.

    Raises:
        ValueError: none of these is what the model takes.
    """
    owner: Any = next((m for m in (model, getattr(model, "model", None)) if hasattr(m, "get_image_features")), None)
    failures = []
    for image in _forms(owner, model.config) if owner is not None else ():
        try:
            with torch.no_grad():
                found = owner.get_image_features(**image)
                features = getattr(found, "pooler_output", found)
                features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
                tokens = features.numel() // model.get_input_embeddings().embedding_dim
                ids = torch.ones(1, tokens + 4, dtype=torch.int64)
                ids[:, 2:-2] = image_token(model.config)
                model(ids, **image, **kinds_of_tokens(model, ids))
        except Exception as error:  # this form is not the model's
            failures.append(f"{_shapes(image)}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        else:
            return image, tokens
    why = "; ".join(failures) or "it has no get_image_features"
    raise ValueError(f"--images: how {type(model).__name__} takes images is not known ({why}); give a folder of it")


def kinds_of_tokens(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """1 where an image is and 0 where text is, `(B, S)`, by the names that the model takes it under."""
    takes = inspect.signature(model.forward).parameters
    kinds = (ids == image_token(model.config)).long()
    return {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in takes}


def _small(config: Any, size: int) -> Any:
    small = shrink(config, layers=4, ranks_of_heads=2 * size)
    text, vision = small.get_text_config(), getattr(small, "vision_config", None)
    text.vocab_size = VOCABULARY + 64
    for part in (small, text):
        names = [name for name in vars(part) if name.endswith(("_token_id", "_token_index")) and name not in _OF_TEXT]
        for place, name in enumerate(sorted(names)):
            setattr(part, name, VOCABULARY + place)
        for name in _OF_TEXT:
            setattr(part, name, None)
    rope = getattr(text, "rope_parameters", None)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if isinstance(rope, dict) and "rope_theta" in rope:  # a half of what turns is for rows and columns of an image
        turned = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [turned - 2 * (3 * turned // 8), 3 * turned // 8, 3 * turned // 8]
    patch = getattr(vision, "patch_size", None)
    width, indexes = text.hidden_size, ("fullatt_block_indexes", "deepstack_visual_indexes")
    sizes = {"out_hidden_size": width, "embed_dim": width, "depth": 2, "num_hidden_layers": 2}
    for name, value in (sizes | {name: [1] for name in indexes}).items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    if isinstance(patch, int) and isinstance(getattr(vision, "image_size", None), int):
        vision.image_size = 4 * patch
    for name, value in _FEWER_TOKENS.items():
        if hasattr(small, name):
            setattr(small, name, value)
    return small


# An image of four by four patches has no more tokens than these.
_FEWER_TOKENS = {"mm_tokens_per_image": 4, "scale_factor": 2}


def _forms(owner: Any, config: Any) -> Any:
    """What `get_image_features` may take, one after the other."""
    takes = inspect.signature(owner.get_image_features).parameters
    vision = getattr(config, "vision_config", config)
    patch, side = getattr(vision, "patch_size", 4), getattr(vision, "image_size", 16)
    patch, side = (value if isinstance(value, int) else value[0] for value in (patch, side))
    if "image_grid_thw" in takes:
        merged = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", 2)
        high = 2 * merged if isinstance(merged, int) else 4
        grid = torch.tensor([[1, high, high]])
        width = 3 * getattr(vision, "temporal_patch_size", 1) * patch * patch
        for shape in ((high * high, width), (high * high, 3, patch, patch)):
            yield {"pixel_values": torch.randn(shape), "image_grid_thw": grid}
        return
    sizes = {"image_sizes": torch.tensor([[side, side]])} if "image_sizes" in takes else {}
    for shape in ((1, 3, side, side), (1, 1, 3, side, side)):
        yield {"pixel_values": torch.randn(shape), **sizes}


def _shapes(image: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in image.items())
