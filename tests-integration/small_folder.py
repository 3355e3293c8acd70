"""A Hugging Face folder as people have one, small: real text's tokens, a chat template, random weights; and chats."""

from __future__ import annotations

import json
import pathlib
import sysconfig

import torch

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


IMAGE_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2, "head_dim": 8, "vocab_size": 512, "max_position_embeddings": 512}


def make_folder(folder: pathlib.Path, family: str = "llama", **sizes: object) -> pathlib.Path:
    """A model of 512 tokens learned from Python's own sources; `from_pretrained` loads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = learn_tokens()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_folder_with_images(folder: pathlib.Path) -> pathlib.Path:
    """A Llava of the same kind, with a processor that makes sixteen tokens of an image."""
    from transformers import (
        AutoModelForImageTextToText,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    tokenizer = learn_tokens("<image>")
    side = {"height": 56, "width": 56}
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=side)
    counts = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, chat_template=IMAGE_TEMPLATE, **counts).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**tower, image_size=56, patch_size=14)
    text = LlamaConfig(**SMALL | {"vocab_size": len(tokenizer), "num_hidden_layers": 4})
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def learn_tokens(*more: str):
    """A fast tokenizer of 512 tokens, learned from Python's own sources, and of some special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    library = pathlib.Path(sysconfig.get_path("stdlib"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train([str(library / name) for name in ("ast.py", "heapq.py", "textwrap.py")], trainer)
    ends = dict.fromkeys(("eos_token", "pad_token"), special[0])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    fast.add_special_tokens({"additional_special_tokens": list(more)})
    return fast


def make_chats(path: pathlib.Path, number: int = 40) -> pathlib.Path:
    """Questions about the standard library's functions, answers of unequal lengths."""
    import textwrap

    lines = []
    for place, name in enumerate(sorted(dir(str))[:number]):
        says = textwrap.shorten(str(getattr(str, name).__doc__ or name), 40 + 6 * place)
        chat = [{"role": "user", "content": f"What is str.{name}?"}, {"role": "assistant", "content": says}]
        lines.append(json.dumps({"messages": chat}))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_chats_with_images(folder: pathlib.Path, number: int = 12) -> pathlib.Path:
    """Questions about squares of one colour, one or two in a chat; every third chat has none."""
    from PIL import Image

    colours = ["red", "green", "blue", "white"]
    lines = []
    for place in range(number):
        asked = [{"type": "text", "text": f"What colour? {place}"}]
        for image in range(place % 3):
            path = folder / f"{place}-{image}.png"
            Image.new("RGB", (20 + place, 30), colours[(place + image) % 4]).save(path)
            asked.insert(0, {"type": "image", "path": path.name} if image else {"type": "image", "image": path.name})
        says = " and ".join(colours[(place + image) % 4] for image in range(place % 3)) or "I see no image."
        chat = [{"role": "user", "content": asked if place % 3 else asked[0]["text"]}]
        lines.append(json.dumps({"messages": [*chat, {"role": "assistant", "content": says}]}))
    path = folder / "images.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
