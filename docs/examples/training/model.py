"""Build a transformers causal LM, or a model of images and text, from a model type or a local folder."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import nn

from training.text import VOCABULARY

# Fields that `--size` multiplies, with what they are at size 1.
_WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
_EXPERTS = {
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# DeepSeek's attention through latent vectors, which has no fewer key heads than query heads.
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}


def build_config(name: str, size: int) -> Any:
    """A config for a model type (`qwen3_moe`, `llama`, …) at a small size, or of a local folder as it is.

    Args:
        name: a transformers model type, or a folder with a `config.json`.
        size: multiplies the widths (and the number of heads); 1 is what a laptop trains in a minute.

    Raises:
        ValueError: neither a folder nor a model type; a vocabulary too small for bytes.
    """
    from transformers import AutoConfig

    if size < 1:
        raise ValueError(f"--size must be at least 1, got {size}")
    if os.path.isdir(name):
        config = AutoConfig.from_pretrained(name, local_files_only=True)
        for field in (*_WIDTHS, "moe_intermediate_size"):
            if size > 1 and isinstance(getattr(config, field, None), int):
                setattr(config, field, size * getattr(config, field))
    else:
        try:
            config = AutoConfig.for_model(name)
        except ValueError:
            raise ValueError(f"--config {name!r} is neither a folder nor a transformers model type") from None
        for field, value in _WIDTHS.items():
            if hasattr(config, field):
                setattr(config, field, size * value)
        for field, value in _EXPERTS.items():
            if isinstance(getattr(config, field, None), int):
                setattr(config, field, size * value if field == "moe_intermediate_size" else value)
        if hasattr(config, "kv_lora_rank"):
            latent = {**_LATENT, "qk_head_dim": 32, "num_key_value_heads": config.num_attention_heads}
            for field, value in latent.items():
                setattr(config, field, value)
        small = {"num_hidden_layers": 4, "head_dim": 16, "vocab_size": VOCABULARY, "max_position_embeddings": 4096}
        for field, value in small.items():
            if hasattr(config, field):
                setattr(config, field, value)
        for field in ("layer_types", "sliding_window"):
            if getattr(config, field, None) is not None:
                setattr(config, field, config.layer_types[:4] if field == "layer_types" else 64)
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if config.vocab_size < VOCABULARY:
        raise ValueError(f"--config {name!r} has vocab_size={config.vocab_size}; bytes need {VOCABULARY}")
    config.use_cache = False
    return config


def build_model(config: Any, seed: int, lora: int = 0, images: bool = False) -> nn.Module:
    """The model with the same random weights on every rank, float32; with adapters of rank `lora`, if not 0."""
    torch.manual_seed(seed)
    model = auto_class(images).from_config(config, dtype=torch.float32)
    if lora:
        add_adapters(model, lora, seed)
    return model


def auto_class(images: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if images else AutoModelForCausalLM


def model_without_weights(folder: str, lora: int, seed: int, images: bool = False) -> nn.Module:
    """A folder's model on meta, float32, to be laid out before `am_fsdp.load_hf_weights` fills it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = auto_class(images).from_config(config, dtype=torch.float32)
        if lora:
            add_adapters(model, lora, seed)
    torch.manual_seed(seed)  # adapters begin by it
    return model


def model_in_4_bits(
    folder: str, lora: int, seed: int, dtype: torch.dtype, device: torch.device, images: bool = False
) -> nn.Module:
    """A folder's model with bitsandbytes' NF4 weights in its linears and adapters over them, float32.

    Every rank holds the base whole, at half a byte a weight, until it is laid out.

    Args:
        dtype: to compute in. Packed weights are stored as numbers of it, since FSDP2 casts what has another.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes accelerate")
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )
    model = auto_class(images).from_pretrained(
        folder, quantization_config=packed, dtype=torch.float32, device_map={"": device}, local_files_only=True
    )
    add_adapters(model, lora, seed)
    return model.train()


def add_adapters(model: nn.Module, rank: int, seed: int) -> None:
    """Put peft's LoRA adapters into every linear of the layers but the router's, and train nothing else; in place.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("--lora needs peft: pip install peft") from None
    linears = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and not name.endswith("gate")
    }
    torch.manual_seed(seed)
    # Without peft's wrapper around the model: its forward is the model's own.
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=sorted(linears)), model)


def build_optimizer(part: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW over what is trained of a model or of a part of it."""
    return torch.optim.AdamW((p for p in part.parameters() if p.requires_grad), lr=lr, foreach=False)


def main_output(output: Any) -> torch.Tensor:
    """The tensor of a model's output that a loss takes: logits where there is a head, else the last hidden state."""
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy in nats of `(B, S, V)` logits against `(B, S)` labels, in float32 or wider; -100 is not counted."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), reduction=reduction)


class TokenMean:
    """A loss whose mean over equal shares of a batch, microbatches on ranks, is the mean over all labels of the batch,
    however unequally these lie in the shares.

    Args:
        shares: microbatches of a rank times data and context ranks.
    """

    def __init__(self, shares: int) -> None:
        self.shares = shares
        self.each = 1.0

    def expect(self, labels: torch.Tensor) -> None:
        """The labels of the whole batch, before its step."""
        self.each = max(1, int((labels != -100).sum())) / self.shares

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return next_token_loss(logits, labels, "sum") / self.each
