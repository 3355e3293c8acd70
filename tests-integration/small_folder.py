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


def make_folder(folder: pathlib.Path, family: str = "llama", **sizes: object) -> pathlib.Path:
    """A model of 512 tokens learned from Python's own sources; `from_pretrained` loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)

    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"num_hidden_layers": 2, "head_dim": 8, "vocab_size": 512, "max_position_embeddings": 512}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **small | sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


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
