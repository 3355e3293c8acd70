"""Models that take images with text, small, and a batch as a processor would give it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from am_testkit.zoo import let_weights_count, small_config

# The side of an image in pixels; every patch size below divides it.
_SIDE = 16
_TEXT = 7  # tokens of text in a row, beside those of images
# What makes the default config of a type one that can be built and run small.
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_HALF_MROPE = {
    "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
}
# Features of images that enter several layers, of a tower as small as these; without, it has none.
DEEPSTACK = {"vision_config": {"deepstack_visual_indexes": [0, 1]}}
_TILES = {"image_grid_pinpoints": [[56, 112], [112, 56]]}
_SETTINGS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 60},
    "exaone4_5": {"vision_config": {"window_size": 56}},
    "gemma3": {"mm_tokens_per_image": 4},
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    "glm4v_moe": {"text_config": _HALF_MROPE},
    "glm_ocr": {"text_config": _MROPE},
    "glmga": {"text_config": _MROPE},
    "hyperclovax_vision_v2": {"vision_config": {"window_size": 56}},
    "idefics3": {"scale_factor": 2},
    "instructblip": {"image_token_index": 60},
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "paddleocr_vl": {"text_config": _MROPE},
    "qwen2_5_omni_thinker": {"vision_config": {"window_size": 56}},
    "qwen2_5_vl": {"vision_config": {"window_size": 56}, "text_config": _MROPE},
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "hidden_size": 32}, "text_config": _MROPE},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "smolvlm": {"scale_factor": 2},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
}
_TYPES = (
    "blip-2",
    "cohere2_vision",
    "cosmos3_omni",
    "deepseek_vl",
    "exaone4_5",
    "gemma3",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "got_ocr2",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "minimax_m3_vl",
    "mistral3",
    "mistral_large4",
    "ovis2",
    "paddleocr_vl",
    "qianfan_ocr",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen4_exp",
    "smolvlm",
    "video_llava",
)
# Names that transformers gives the id of the token that stands for a part of an image.
_IMAGE_TOKEN = ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_token_id")


def natural_types() -> list[str]:
    """The model types of `AutoModelForImageTextToText` that can be had small and whose images are known here."""
    return sorted(_TYPES)


def small_with_images(
    model_type: str, layers: int = 4, dtype: torch.dtype = torch.float64, attention: str | None = None, **more: Any
) -> nn.Module:
    """A model of the type with seeded random weights in evaluation mode; see `am_testkit.zoo.small`."""
    from transformers import AutoModelForImageTextToText

    settings = _SETTINGS.get(model_type, {}) | more
    tower = _small_tower(model_type) | settings.get("vision_config", {})
    config = small_config(model_type, layers, **(settings | ({"vision_config": tower} if tower else {})))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    let_weights_count(model)
    return model.eval()


def _small_tower(model_type: str) -> dict[str, Any]:
    """An image of four patches by four, where the config of the vision tower has a size; features of two depths."""
    from transformers import CONFIG_MAPPING

    vision = getattr(CONFIG_MAPPING[model_type](), "vision_config", None)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    settings = {"deepstack_visual_indexes": [0, 1]} if hasattr(vision, "deepstack_visual_indexes") else {}
    if isinstance(size, int) and isinstance(patch, int):
        return settings | {"image_size": 4 * patch}
    if isinstance(size, (list, tuple)) and isinstance(patch, (list, tuple)):
        return settings | {"image_size": [4 * p for p in patch]}
    return settings


def natural_batch(model: nn.Module, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids with one image in every row, and that image, as the model's processor would give them.

    Args:
        model: from `small_with_images`.
        rows: sequences.
        seed: of ids and pixels.

    Returns:
        Keyword arguments of the model's forward, `input_ids` `(rows, S)` first.

    Raises:
        NotImplementedError: no form of images that is known here is taken by the model.
    """
    generator = torch.Generator().manual_seed(seed)
    failures = []
    for images in _forms(model, rows, generator):
        try:
            with torch.no_grad():
                found = _images_of(model).get_image_features(**images)
            tokens = _count(found, model, rows)
            batch = _with_text(model, images, tokens, rows, generator)
            with torch.no_grad():
                model(**batch)
        except Exception as error:  # this form is not the model's
            failures.append(f"{_shapes(images)}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        return batch
    raise NotImplementedError("; ".join(failures) or "no form of images is known")


def _images_of(model: Any) -> Any:
    return next(m for m in (model, getattr(model, "model", None), model) if hasattr(m, "get_image_features"))


def _forms(model: Any, rows: int, generator: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
    """What `get_image_features` may take, one after the other."""
    names = inspect.signature(_images_of(model).get_image_features).parameters
    vision = getattr(model.config, "vision_config", model.config)
    dtype = next(model.parameters()).dtype

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    side = getattr(vision, "image_size", _SIDE)
    side = side if isinstance(side, int) else side[0]
    patch = getattr(vision, "patch_size", 4)
    patch = patch if isinstance(patch, int) else patch[0]
    if "image_grid_thw" in names:
        width = 3 * getattr(vision, "temporal_patch_size", 1) * patch * patch
        merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", 2)
        high = 2 * merge if isinstance(merge, int) else 4
        grid = torch.tensor([[1, high, high]] * rows)
        count = rows * high * high
        for shape in ((count, width), (count, 3, patch, patch)):
            yield {"pixel_values": pixels(*shape), "image_grid_thw": grid}
        return
    sizes = {"image_sizes": torch.tensor([[side, side]] * rows)} if "image_sizes" in names else {}
    for shape in ((rows, 3, side, side), (rows, 1, 3, side, side), (rows, 3, 3, side, side)):
        yield {"pixel_values": pixels(*shape), **sizes}


def _count(found: Any, model: Any, rows: int) -> int:
    """Tokens of one image among the features that the model made of all."""
    features = getattr(found, "pooler_output", found)
    features = features[0] if isinstance(features, tuple) and len(features) == 1 else features
    width = model.get_input_embeddings().embedding_dim
    total = sum(f.numel() for f in features) if isinstance(features, (list, tuple)) else features.numel()
    if total % (width * rows):
        raise ValueError(f"{total} features of width {width} for {rows} images")
    return total // (width * rows)


def _with_text(
    model: Any, images: dict[str, torch.Tensor], tokens: int, rows: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    config = model.config
    token = next((getattr(config, name) for name in _IMAGE_TOKEN if getattr(config, name, None) is not None), None)
    if token is None:
        raise ValueError("its config names no token for images")
    ids = torch.randint(3, 50, (rows, tokens + _TEXT), generator=generator)
    ids[:, 2 : 2 + tokens] = token
    kinds = (ids == token).long()
    takes = inspect.signature(model.forward).parameters
    marks = {name: kinds for name in ("token_type_ids", "mm_token_type_ids") if name in takes}
    return {"input_ids": ids, **images, **marks}


def _shapes(images: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in images.items())
