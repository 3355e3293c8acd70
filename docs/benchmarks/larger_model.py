"""Is a model of a size that people use trained exactly? 135 million parameters in three layouts, against one process.

    python docs/benchmarks/larger_model.py [--steps 3]

The shape is that of SmolLM2-135M: 30 layers of 576, 9 heads on 3 key heads, 49,152 tokens, tied; weights are random.
Takes about 6 GB and, on two cores, ten minutes.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

from transformers import LlamaConfig

TRAIN = pathlib.Path(__file__).parents[1] / "examples" / "train.py"
LAYOUTS = {"pp 2": ["--pp", 2, "--dp", 1], "fsdp 2": ["--pp", 1, "--dp", 2], "tp 3": ["--pp", 1, "--dp", 1, "--tp", 3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    print("| layout | loss, largest relative difference | norm | MB of weights per rank |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, **heads).save_pretrained(folder)
        settings = ["--config", folder, "--steps", steps, "--batch", 4, "--seq-len", 32, "--lr", 1e-4, "--check"]
        for name, layout in LAYOUTS.items():
            ranks = 3 if name == "tp 3" else 2
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [*launcher, TRAIN, *settings, *layout, "--out", f"{folder}/{name}"]
            run = subprocess.run(list(map(str, command)), capture_output=True, text=True)  # noqa: S603
            found = re.search(r"of the loss (\S+) and of the gradient norm (\S+) in", run.stdout)
            if run.returncode or not found:
                raise SystemExit(f"{name} failed:\n{run.stdout}\n{run.stderr}")
            print(
                f"| {name} | {found[1]} | {found[2]} | {re.search(r'per rank: (.+) MB', run.stdout)[1]} |", flush=True
            )


if __name__ == "__main__":
    main()
