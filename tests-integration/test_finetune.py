"""A folder and chats in, a folder out: `docs/examples/train.py --model`."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from am_testkit.exact import assert_same
from am_testkit.torchrun import Torchrun

TRAIN = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "train.py"

sys.path[:0] = [str(TRAIN.parent), str(pathlib.Path(__file__).parent)]

from small_folder import make_chats, make_folder

from training.examples import IGNORED, Examples
from training.model import TokenMean, next_token_loss
from training.rate import Rate

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)
LENGTH = 96


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return make_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl")


@pytest.fixture(scope="module")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def launch(ranks, layout, base, text, out, *more):
    arguments = [*layout.split(), "--model", base, "--text", text, "--batch", 8, "--seq-len", LENGTH, "--out", out]
    with Torchrun(ranks, TRAIN, *arguments, *more) as job:
        code = job.finish(240)
    assert code == 0, job.output
    return job.output


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def whole_loss(model, text):
    total = number = 0
    for ids, labels, more in text.every_row(8):
        with torch.no_grad():
            total += next_token_loss(model(ids, use_cache=False, **more).logits, labels, "sum")
        number += (labels != IGNORED).sum()
    return float(total / number)


LAYOUTS = [
    ("--pp 1 --dp 2 --tp 2 --sequence-parallel", 4, ("--recompute",)),
    ("--pp 2 --dp 1 --cp 2", 4, ("--packed",)),
    ("--pp 2 --dp 1", 2, ("--lora", 4, "--packed")),
]
if os.environ.get("AM_SWEEP"):
    LAYOUTS += [("--pp 2 --dp 2", 4, ()), ("--pp 1 --dp 2", 2, ("--lora", 4))]


@pytest.mark.parametrize(("layout", "ranks", "more"), LAYOUTS)
def test_a_folder_is_trained_as_by_one_process_and_what_is_written_has_the_loss_that_was_printed(
    layout, ranks, more, base, chats, tokenizer, tmp_path
):
    from transformers import AutoModelForCausalLM

    steps = ("--steps", 3, "--check", "--eval-text", chats, "--warmup", 2, "--decay", "cosine")
    output = launch(ranks, layout, base, chats, tmp_path, *steps, *more)
    assert "check: the run agrees with one process" in output
    printed = float(re.findall(r"evaluation loss ([\d.]+)", output)[-1])
    if (tmp_path / "adapter").exists():
        import peft

        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    text = Examples(str(chats), tokenizer, LENGTH, "--packed" in more)
    assert whole_loss(model.eval(), text) == pytest.approx(printed, abs=2e-6)
    if not more or more[0] != "--lora":
        configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "model")]
        assert configs[0] == configs[1]
    assert whole_loss(AutoModelForCausalLM.from_pretrained(base).eval(), text) != pytest.approx(printed, abs=1e-5)


def test_adapters_over_a_base_in_4_bits_are_trained_as_by_one_process(base, chats, tmp_path):
    pytest.importorskip("bitsandbytes")
    packed = ("--lora", 4, "--load-in-4bit", "--steps", 3)
    output = launch(2, "--pp 1 --dp 2", base, chats, tmp_path, *packed, "--check")
    assert "check: the run agrees with one process" in output
    held = [float(number) for number in re.findall(r"weights per rank: ([\d.]+), ([\d.]+) MB", output)[0]]
    in_full = sum(p.numel() for p in load(base).parameters()) * 4 / 1e6
    assert held[0] == held[1] < in_full / 2, "half of the embedding, and of an eighth of the linears"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "adapter").iterdir()}


def test_a_base_in_4_bits_is_cut_into_stages_whose_packed_linears_are_whole(base, chats, tmp_path):
    pytest.importorskip("bitsandbytes")
    packed = ("--lora", 4, "--load-in-4bit", "--steps", 2)
    output = launch(4, "--pp 2 --dp 2", base, chats, tmp_path, *packed, "--check")
    assert "check: the run agrees with one process" in output
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_an_evaluation_has_no_dropout_and_what_follows_it_has(chats, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    base = make_folder(tmp_path / "base", attention_dropout=0.5)
    steps = ("--steps", 3, "--eval-text", chats, "--eval-every")
    output = launch(2, "--pp 2 --dp 1", base, chats, tmp_path / "often", *steps, 1)
    launch(2, "--pp 2 --dp 1", base, chats, tmp_path / "once", *steps, 9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "often" / "model").eval()
    printed = float(re.findall(r"evaluation loss ([\d.]+)", output)[-1])
    assert whole_loss(model, Examples(str(chats), tokenizer, LENGTH)) == pytest.approx(printed, abs=2e-6)
    assert len({(tmp_path / run / "losses.txt").read_text() for run in ("often", "once")}) == 1


def test_bfloat16_agrees_with_one_process(base, chats, tmp_path):
    output = launch(2, "--pp 1 --dp 2", base, chats, tmp_path, "--steps", 2, "--dtype", "bfloat16", "--check")
    assert "check: the run agrees with one process" in output


def test_a_run_that_is_continued_draws_the_dropout_of_one_that_never_ended_and_writes_a_folder_that_is_missing(
    chats, tmp_path
):
    base, half = make_folder(tmp_path / "base", attention_dropout=0.5), ("--dtype", "bfloat16", "--warmup", 3)
    launch(2, "--pp 1 --dp 2", base, chats, tmp_path / "one", "--steps", 4, *half)
    launch(2, "--pp 1 --dp 2", base, chats, tmp_path / "two", "--steps", 2, *half)
    launch(2, "--pp 1 --dp 2", base, chats, tmp_path / "two", "--steps", 4, "--resume", *half)
    losses = [(tmp_path / run / "losses.txt").read_text() for run in ("one", "two")]
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 4
    written = load(tmp_path / "two" / "model").state_dict()
    shutil.rmtree(tmp_path / "two" / "model")
    output = launch(2, "--pp 2 --dp 1", base, chats, tmp_path / "two", "--steps", 4, "--resume", *half)
    assert "has trained for 4 steps" in output
    assert_same(load(tmp_path / "two" / "model").state_dict(), written, 0.0, "weights")


def test_a_base_that_lies_where_the_run_writes_is_refused_and_left_alone(chats, tmp_path):
    base = make_folder(tmp_path / "run" / "model")
    there = sorted(path.name for path in base.iterdir())
    arguments = ["--model", base, "--text", chats, "--out", tmp_path / "run"]
    with Torchrun(1, TRAIN, *arguments) as job:
        assert job.finish(100) != 0
    assert re.search(r"--model .* lies in --out .*: name another --out", job.output)
    assert sorted(path.name for path in base.iterdir()) == there


def test_lines_end_where_a_file_says_and_tools_are_written(tokenizer, tmp_path):
    path = tmp_path / "odd.jsonl"
    tools = [{"type": "function", "function": {"name": "f"}}]
    lines = [{"text": "one\u2028two\x85three"}, {"messages": [{"role": "user", "content": "?"}], "tools": tools}]
    path.write_text("\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    text = Examples(str(path), tokenizer, LENGTH)
    assert text.source.endswith(
        "1 pieces of " + str(path) + f" in 1 rows, 1 left out with nothing to learn in {LENGTH} tokens"
    )
    assert tokenizer.decode(text.labels[text.labels != IGNORED]) == "\u2028two\x85three<|end|>"
    taught = copy.copy(tokenizer)
    taught.chat_template = "{{ tools | length if tools else 0 }} {% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "yes"}]
    path.write_text(json.dumps({"messages": messages, "tools": tools}))
    assert tokenizer.decode(Examples(str(path), taught, LENGTH).ids[0]).startswith("1 so?ye")
    path.write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"odd\.jsonl is no UTF-8"):
        Examples(str(path), tokenizer, LENGTH)


def test_the_answers_of_a_chat_are_learned_and_nothing_else(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four, five.")]
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}) + "\n")
    text = Examples(str(path), tokenizer, LENGTH)
    ids, labels, more = text.batch(1, LENGTH, 0, 0)
    assert tokenizer.decode(labels[labels != IGNORED]) == "Two.<|end|>Four, five.<|end|>"
    taught = labels[0] != IGNORED
    assert torch.equal(labels[0, taught][:-1], ids[0].roll(-1)[taught][:-1]), "each label is the token that follows"
    assert not more


def test_prompts_and_long_texts(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    long = "import this and that; " * 60
    path.write_text(
        "\n".join(map(json.dumps, [{"prompt": "2 + 2 = ", "completion": "4"}, {"text": long}, {"text": "end"}]))
    )
    text = Examples(str(path), tokenizer, LENGTH)
    learned = [tokenizer.decode(row[row != IGNORED]) for row in text.labels]
    assert learned[0] == "4<|end|>"
    tokens = tokenizer(long).input_ids
    assert torch.cat([row[row != IGNORED] for row in text.labels[1:-1]]).tolist() == [*tokens[1:], 0], "nothing is lost"


def test_packed_texts_do_not_see_each_other(base, chats, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    packed, alone = (Examples(str(chats), tokenizer, LENGTH, packed) for packed in (True, False))
    assert len(packed.ids) < len(alone.ids)
    assert (packed.labels != IGNORED).sum() == (alone.labels != IGNORED).sum()
    assert whole_loss(model, packed) == pytest.approx(whole_loss(model, alone), rel=1e-6)


def test_a_model_whose_layers_keep_a_state_is_refused_packed_rows(chats, tmp_path):
    base = make_folder(tmp_path / "base", "lfm2", layer_types=["conv", "full_attention"])
    arguments = ["--model", base, "--text", chats, "--steps", 2, "--batch", 8, "--seq-len", LENGTH, "--packed"]
    with Torchrun(2, TRAIN, "--pp", 1, "--dp", 2, *arguments, "--out", tmp_path / "run") as job:
        assert job.finish(120) != 0
    assert "model.layers.0.conv keeps a state from one text of a row to the next" in job.output
    assert not (tmp_path / "run" / "latest").exists()


def test_other_neighbours_tell_attention_that_mixes_texts_from_one_that_does_not(base, chats, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    batches = Examples(str(chats), tokenizer, LENGTH, packed=True).with_other_neighbours(2)
    losses = {}
    with torch.no_grad():
        for cache in (False, True):  # with a cache, transformers takes a row for one text
            losses[cache] = [float(next_token_loss(model(i, use_cache=cache, **m).logits, t)) for i, t, m in batches]
    assert losses[False][0] == losses[False][1]
    assert abs(losses[True][0] - losses[True][1]) > 1e-6 * losses[True][0], "what the job refuses"


def test_every_row_comes_once_before_any_comes_again(chats, tokenizer):
    text = Examples(str(chats), tokenizer, LENGTH)
    rows = torch.cat([text.batch(8, LENGTH, 3, step)[0] for step in range(10)])
    for epoch in rows.split(len(text.ids)):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, text.ids.tolist()))
    assert not torch.equal(*rows.split(len(text.ids)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of .* is no JSON"),
        ('{"question": "?"}', 'line 2 of .* has neither "text", "messages", nor "prompt"'),
        ('{"messages": [{"content": "no role"}]}', "line 2 of .*: KeyError|line 2 of .*role"),
        ('["text"]', "line 2 of .* has neither"),
    ],
)
def test_a_line_that_is_no_example_is_refused_by_its_number(line, words, tokenizer, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good enough"}\n' + line + "\n")
    with pytest.raises(ValueError, match=words):
        Examples(str(path), tokenizer, LENGTH)


def test_nothing_to_learn_is_refused(tokenizer, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "anybody?"}]}\n')
    with pytest.raises(ValueError, match="nothing to learn in 96 tokens"):
        Examples(str(path), tokenizer, LENGTH)


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=4, max_size=4))
def test_the_mean_over_shares_is_the_mean_over_all_labels(counted):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(0, 5, (4, 3))
    labels[~torch.tensor(counted)] = IGNORED
    loss = TokenMean(4)
    loss.expect(labels)
    mean = sum(loss(logits[i : i + 1], labels[i : i + 1]) for i in range(4)) / 4
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert float(mean) == pytest.approx(float(total / max(1, (labels != IGNORED).sum())), rel=1e-12)


@given(st.integers(0, 9), st.integers(1, 40))
def test_the_rate_grows_then_falls_to_a_tenth(warmup, steps):
    rates = [Rate(2.0, warmup, steps, "cosine").at(step) for step in range(steps)]
    assert all(0.2 - 1e-12 <= rate <= 2.0 for rate in rates[warmup:])
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps - warmup > 1:
        assert rates[-1] == pytest.approx(0.2)
        assert rates[warmup] == 2.0
