"""`docs/examples/train.py --images`: a model of images and text, from its type and from a folder."""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys

import pytest
import torch

from am_testkit.torchrun import Torchrun

TRAIN = pathlib.Path(__file__).parents[1] / "docs" / "examples" / "train.py"

sys.path[:0] = [str(TRAIN.parent), str(pathlib.Path(__file__).parent)]

from small_folder import make_chats_with_images, make_folder, make_folder_with_images

from training.examples import IGNORED
from training.image_chats import ImageChats
from training.made_up_images import MadeUpImages
from training.model import build_model, next_token_loss
from training.text import ByteText
from training.vision import build_vision_config, freeze_towers, image_token

pytestmark = pytest.mark.skipif(
    os.environ.get("WORLD_SIZE", "2") != "2", reason="starts processes of its own: runs once, with the two-rank suite"
)
AGREES = "check: the run agrees with one process"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_folder_with_images(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return make_chats_with_images(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def processor(base):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(base)


def launch(ranks, *arguments):
    with Torchrun(ranks, TRAIN, "--images", "--batch", 8, *arguments) as job:
        code = job.finish(240)
    assert code == 0, job.output
    return job.output


def test_a_type_trains_as_in_one_process_with_a_frozen_tower_and_goes_on_where_it_was(tmp_path):
    layout = ("--config", "qwen2_5_vl", "--freeze-tower", "--pp", 2, "--dp", 2, "--seq-len", 32, "--out", tmp_path)
    launch(4, *layout, "--steps", 1)
    output = launch(4, *layout, "--steps", 3, "--resume", "--check")
    assert AGREES in output
    assert "an image of 4 tokens in every row" in output
    assert (tmp_path / "timeline.png").stat().st_size > 10_000


def test_experts_and_images_over_tensor_ranks_too(tmp_path):
    layout = ("--config", "qwen3_vl_moe", "--pp", 1, "--dp", 2, "--tp", 2, "--ep", 4, "--seq-len", 32)
    assert AGREES in launch(4, *layout, "--steps", 2, "--check", "--out", tmp_path)


@pytest.mark.parametrize("layout", [("--pp", 2, "--dp", 1), ("--pp", 1, "--dp", 2)], ids=["pp2", "dp2"])
def test_a_folder_learns_chats_of_which_some_have_images(layout, base, chats, processor, tmp_path):
    """Of two rows in a microbatch, none, one or both have images; and on two data ranks not the same number."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    files = ("--model", base, "--text", chats, "--eval-text", chats, "--seq-len", 64, "--out", tmp_path)
    output = launch(2, *layout, *files, "--steps", 3, "--lr", "1e-3", "--check")
    assert AGREES in output
    printed = float(re.findall(r"evaluation loss ([\d.]+)", output)[-1])
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    text = ImageChats(str(chats), AutoProcessor.from_pretrained(tmp_path / "model"), 64)
    total = number = 0
    for ids, labels, inputs in text.every_row(8):
        with torch.no_grad():
            total += next_token_loss(trained(ids, **inputs(slice(0, 8))).logits, labels, "sum")
        number += (labels != IGNORED).sum()
    assert float(total / number) == pytest.approx(printed, abs=2e-6)


def test_answers_are_learned_and_images_belong_to_their_rows(chats, processor):
    text = ImageChats(str(chats), processor, 64)
    ids, labels, inputs = next(text.every_row(12))
    said = [processor.tokenizer.decode(row[row != IGNORED]) for row in labels]
    assert said[:3] == ["I see no image.<|end|>", "green<|end|>", "blue and white<|end|>"]
    learned = labels != IGNORED
    assert torch.equal(labels[:, :-1][learned[:, :-1]], ids[:, 1:][learned[:, :-1]]), (
        "labels are the tokens that follow"
    )
    whole, some = (inputs(rows)["pixel_values"] for rows in (slice(0, 12), slice(2, 5)))
    assert len(whole) == 12
    assert torch.equal(whole[1:4], some), "two of the third row, none of the fourth, one of the fifth"
    assert not inputs(slice(3, 4)), "a row of text alone"


def test_made_up_images_are_those_of_their_rows_and_no_label_is_a_part_of_one():
    config = build_vision_config("gemma3", 1)
    text = MadeUpImages(ByteText(), build_model(config, 0, images=True))
    ids, labels, inputs = text.batch(4, 16, 0, 0)
    assert ((ids == image_token(config)).sum(1) == text.tokens).all()
    assert not (labels == image_token(config)).any()
    pixels = inputs(slice(0, 4))["pixel_values"]
    assert torch.equal(pixels[2:], inputs(slice(2, 4))["pixel_values"])
    assert len({float(image.sum()) for image in pixels}) == 4
    assert inputs(slice(2, 4))["token_type_ids"].equal((ids[2:] == image_token(config)).long())
    with pytest.raises(ValueError, match=r"--seq-len 6 has no room for an image of 4 tokens"):
        text.check(6)


def test_a_frozen_tower_is_all_that_sees_images_and_nothing_else():
    model = build_model(build_vision_config("qwen3_vl", 1), 0, images=True)
    freeze_towers(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.visual.")}
    with pytest.raises(ValueError, match="does not say which of its modules sees images"):
        freeze_towers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_type", "neither a folder nor a transformers model type"),
        ("llama", "transformers has no model of images and text for 'llama'; leave --images out"),
        ("blip-2", "how Blip2ForConditionalGeneration takes images is not known"),
    ],
)
def test_a_type_without_images_or_whose_images_are_not_known_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        MadeUpImages(ByteText(), build_model(build_vision_config(name, 1), 0, images=True))


def image(path):
    return {"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "?"}]}


ANSWER = {"role": "assistant", "content": "Red."}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": "no chat"}, 'line 1 of .* has no "messages"'),
        ({"messages": [image("nothing.png"), ANSWER]}, "line 1 of .*: FileNotFoundError.*nothing.png"),
        ({"messages": [image("image.png") | {"role": "assistant"}]}, "line 1 .* an image is the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a content of type 'audio'; it can be"),
        ({"messages": [image("image.png")] * 3 + [ANSWER]}, r"line 1 .* has \d+ tokens with its images.* --seq-len 32"),
        ({"messages": [image("image.png")]}, "nothing to learn in 32 tokens"),
    ],
)
def test_a_line_that_is_no_chat_with_images_is_refused_by_its_number(line, words, processor, tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 30)).save(tmp_path / "image.png")
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=words):
        ImageChats(str(path), processor, 32)


def test_a_folder_without_a_processor_of_images_is_refused(chats, processor, tmp_path):
    from transformers import AutoProcessor, LlavaProcessor

    text_alone = AutoProcessor.from_pretrained(make_folder(tmp_path / "text"))
    with pytest.raises(ValueError, match="--images: the folder has no processor of images, only a"):
        ImageChats(str(chats), text_alone, 64)
    silent = LlavaProcessor(processor.image_processor, processor.tokenizer, patch_size=14)
    with pytest.raises(ValueError, match="the folder's processor has no chat template"):
        ImageChats(str(chats), silent, 64)
