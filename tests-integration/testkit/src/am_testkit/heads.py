"""Models of transformers that are not causal language models: encoder-decoders, and encoders with a head, small."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from am_testkit.zoo import let_weights_count, small_config

# What a model is for, and transformers' mapping of the types that have a class for it.
TASKS = {
    "translation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "encoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
WITH_DECODER_IDS = ("translation", "speech")
TOKENS, DECODER_TOKENS = 16, 10
# What the defaults of a config leave contradictory once they are small.
_CODEC = {"num_filters": 2, "depths": [2, 1, 1, 1, 1, 1, 1]}  # its width doubles from stage to stage
_SETTINGS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},  # the other one replaces itself when a text is short
    "bigbird_pegasus": {"attention_type": "original_full"},
    "vibevoice": {"audio_config": _CODEC, "semantic_model_config": _CODEC},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _CODEC, "semantic_tokenizer_encoder_config": _CODEC},
    "whisper": {"max_source_positions": 8},
    "xmod": {"default_language": "en_XX"},
}


def types_for(task: str) -> list[str]:
    """The model types with a class for a task."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task]))


def small_for(
    task: str, model_type: str, dtype: torch.dtype = torch.float64, attention: str | None = None, **settings: Any
) -> nn.Module:
    """A model of the type for a task, of four layers in all, with seeded random weights, in evaluation mode.

    Of types with an encoder and a decoder, those for tokens and encodings have the encoder alone.

    Args:
        task: of `TASKS`.
        model_type: of `types_for(task)`.
        dtype: of its weights.
        attention: transformers' name of it; None for what transformers takes by itself.
        settings: of the config.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, TASKS[task])[model_type]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    if model_type.endswith("encoder-decoder"):
        config = _of_two(model_type)
    else:
        settings = (_small_image(CONFIG_MAPPING[model_type]()) if task == "image" else {}) | settings
        two = CONFIG_MAPPING[model_type]().is_encoder_decoder and task not in ("token", "encoding")
        layers = 2 if two else 4
        config = small_config(model_type, layers, **(_SETTINGS.get(model_type, {}) | settings))
        config.is_decoder = False
    config.pad_token_id = config.get_text_config().pad_token_id = 0
    if task in ("sequence", "token", "image"):
        config.num_labels = 3
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    let_weights_count(model)
    return model.eval()


def inputs_for(
    model: nn.Module,
    task: str,
    rows: int,
    seed: int = 0,
    tokens: int = TOKENS,
    decoder: int = DECODER_TOKENS,
    *,
    padded: bool = False,
) -> dict[str, torch.Tensor]:
    """Keyword inputs of a model from `small_for`, its first argument first.

    With a head an encoder-decoder makes the ids of its decoder itself, from a text that ends with its last token.
    `padded` ids have padding on the right of every other row, where the model takes a mask.

    Raises:
        NotImplementedError: its first argument is of a kind that is not known here.
    """
    generator = torch.Generator().manual_seed(seed)
    names = inspect.signature(model.forward).parameters
    first = next(iter(names))

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, 57, (rows, length), generator=generator)

    inputs = {first: ids(tokens) if first == "input_ids" else _features(model, first, rows, generator)}
    if task in WITH_DECODER_IDS and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids(decoder)
    elif first == "input_ids":
        inputs[first][:, -1] = getattr(model.config.get_text_config(), "eos_token_id", None) or 2
    if "bbox" in names and first == "input_ids":
        inputs["bbox"] = torch.arange(4).expand(rows, tokens, 4) + ids(tokens)[..., None]
    if padded and first == "input_ids" and "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(inputs[first])
        inputs["attention_mask"][::2, -3:] = 0
    return inputs


def _small_image(default: Any) -> dict[str, Any]:
    """Settings for an image of four patches by four, or of 64 pixels, and for few and narrow convolutions."""
    size, patch = getattr(default, "image_size", None), getattr(default, "patch_size", None)
    settings: dict[str, Any] = {}
    if isinstance(size, int):
        settings["image_size"] = 4 * patch if isinstance(patch, int) and patch > 4 else 64
    for name, width in (("hidden_sizes", 16), ("depths", 0)):
        if isinstance(values := getattr(default, name, None), (list, tuple)) and all(
            isinstance(v, int) for v in values
        ):
            settings[name] = [width * (place + 1) or 2 for place in range(len(values))]
    return settings


def _features(model: Any, name: str, rows: int, generator: torch.Generator) -> torch.Tensor:
    config, dtype = model.config, next(model.parameters()).dtype
    if name == "pixel_values":
        size = getattr(getattr(config, "vision_config", config), "image_size", 64)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (getattr(config, "num_channels", 3), *sides)
    elif name == "input_features":
        mel = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
        frames = 2 * config.max_source_positions if config.model_type == "whisper" else 24
        shape = (mel, frames) if config.model_type == "whisper" else (frames, mel)
    elif name == "input_values":
        shape = (4000,)
    else:
        raise NotImplementedError(f"the first input is {name}")
    return torch.randn(rows, *shape, generator=generator).to(dtype)


def _of_two(model_type: str) -> Any:
    """The config of a type that joins an encoder of one type and a decoder of another."""
    from transformers import CONFIG_MAPPING

    encoder = small_config("wav2vec2" if model_type.startswith("speech") else "bert", 2)
    decoder = small_config("bert", 2, add_cross_attention=True)
    encoder.is_decoder = False
    return CONFIG_MAPPING[model_type].from_encoder_decoder_configs(encoder, decoder)
