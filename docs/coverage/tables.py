"""Write the tables beside this file from what `nox -s sweep` and `nox -s compositions` measured."""

from __future__ import annotations

import json
import pathlib
import sys

import torch
import transformers

from am_testkit import compositions
from am_testkit.heads import types_for
from am_testkit.natural import natural_types
from am_testkit.zoo import NOT_BUILT, model_types

# What the models of `heads` are for, and the auto classes that build them.
TASKS = {
    "translation": "AutoModelForSeq2SeqLM",
    "speech": "AutoModelForSpeechSeq2Seq",
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
    "image": "AutoModelForImageClassification",
    "encoding": "AutoModelForTextEncoding",
}
HERE = pathlib.Path(__file__).parent
# What nobody says is what the plainest run has.
_FORM = "ids alone, a next-token loss over every token, no dropout, all weights trained."
_FLOATS = "float64, or float32 where a row says so"
_BOTH = "on two ranks the attention that transformers takes by itself (sdpa, where a type has it), on four ranks eager"
CONDITIONS = {
    "tensor": f"Conditions: sdpa and eager attention, the larger error; {_FLOATS}; one step of one pass; {_FORM}",
    "data": f"Conditions: {_BOTH}; {_FLOATS}; one step of one pass; {_FORM}",
    "experts": f"Conditions: {_BOTH}; eager experts; {_FLOATS}; two steps of one pass each; {_FORM}",
    "context": f"Conditions: sdpa (where a type has it) and eager attention, the larger error; {_FLOATS}; one step of "
    f"one pass; {_FORM} Padding, packed documents and other heads are not in this table; am-moe tests some.",
    "compositions": f"Conditions: sdpa attention; float64; three steps of one pass each; {_FORM[:-1]}, of the Llama "
    "its adapters.",
}
VERSIONS = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


def main(folder: str, *names: str) -> None:
    tables = (pipeline, heads, images, some_ranks, tensor, encoders, data, data_heads, experts)
    tables += (context, context_heads, context_images, composed)
    for name, write in ((t.__name__.replace("composed", "compositions"), t) for t in tables):
        if names and name not in names:
            continue
        files = sorted(pathlib.Path(folder).glob(f"{name}-*.json"))
        measured = {file.stem.removeprefix(f"{name}-"): json.loads(file.read_text()) for file in files}
        lines = write(measured)
        (HERE / f"{name}.md").write_text("\n".join(lines) + "\n")
        print(lines[2])


def pipeline(measured: dict[str, dict]) -> list[str]:
    exact, refused = count({name: result for name, result in measured.items() if not result.get("wrong")})
    rows = []
    for name in model_types():
        result = measured.get(name)
        if result and "refused" not in result:
            travels = ", ".join(result["traveling"]) + (" ids" if result["needs_ids"] else "")
            if result["wrong"]:
                travels = f"**wrong** under {len(result['wrong'])} of {result['cases']} conditions"
            columns = [result["errors"][kind][n] for kind in ("sdpa", "eager") for n in ("2", "4")]
            if result["attention"] != "sdpa":  # the type has none; both are eager then
                columns[:2] = [None, None]
            cells = " | ".join("" if error is None else cell(error) for error in columns)
            rows.append(f"| {name} | {result['kind']} | {cells} | {result['dtype']} | {travels} |")
        else:
            rows.append(f"| {name} | | | | | | {why_not(name, result)} | |")
    return [
        "# Pipelining: every causal language model of transformers",
        "",
        f"Of {len(rows)} model types, **{exact} train exactly** on two and on four stages, {refused} are refused,",
        f"and {len(NOT_BUILT)} are not decoders of text by themselves or need more than transformers.",
        "",
        f"`nox -s sweep`, {VERSIONS}. Each is a four-layer model of the type with sizes derived from its config",
        "class, cut and run over two processes: two stages under 1F1B, four under Interleaved1F1B, four sequences in",
        "two microbatches, with *sdpa*, which transformers takes by itself where a type has it, and *eager* attention.",
        "Conditions: float64, one step, ids alone, on two and on four stages under both attentions; with sdpa also",
        "float32, three steps whose gradients add up and batches padded on the right, on two stages, and float64, an",
        "evaluation between two steps and padding, on four. Next-token head, all labels but padding's, no",
        "dropout, all weights trained. The numbers are the largest relative differences from one process among the",
        "logits and all gradients under any of the conditions; the column after them says the wider dtype that the",
        "model's own code runs in. *Travels* names what goes along with the hidden state of the layer before the cut",
        "because later layers take it, on four stages; *ids* says that later stages get the ids.",
        "",
        "| model type | class | sdpa, 2 stages | sdpa, 4 | eager, 2 | eager, 4 | | travels |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def heads(measured: dict[str, dict]) -> list[str]:
    tried = {name: result for name, result in measured.items() if "not built" not in result}
    exact, refused = count(tried)
    rows, counts = [], []
    for task, what in TASKS.items():
        mine = {name: result for name, result in measured.items() if name.startswith(f"{task}-")}
        built = {name: result for name, result in mine.items() if name in tried}
        numbers = (*count(built), len(mine) - len(built), len(types_for(task)))
        counts.append(f"| {task} | {what} | {' | '.join(map(str, numbers))} |")
        for name, result in sorted(mine.items()):
            cells = [cell(result[kind]) if kind in result else "" for kind in ("Interleaved1F1B", "1F1B")]
            more = ", ".join(result.get("travels", []))
            if reason := result.get("refused") or result.get("not built"):
                more = ("refused: " if "refused" in result else "not built: ") + " ".join(reason.split())[:300]
            columns = (
                name.removeprefix(f"{task}-"),
                task,
                result.get("kind", ""),
                *cells,
                result.get("dtype", ""),
                more,
            )
            rows.append(f"| {' | '.join(text.replace('|', '/') for text in columns)} |")
    return [
        "# Pipelining: encoder-decoders, encoders and heads",
        "",
        f"Of {len(tried)} models, **{exact} train exactly**, {refused} are refused. {len(measured) - len(tried)} more",
        "cannot be had small by the test kit. What has no row is not measured.",
        "",
        "| task | class of transformers | exact | refused | not built | types in all |",
        "|---|---|---|---|---|---|",
        *counts,
        "",
        "Of heads for sequences, tokens and questions, the types are here that are no causal language models; the",
        "stacks of those are in [their own table](pipeline.md).",
        "",
        f"`nox -s sweep`, {VERSIONS}. Each is a model of four layers, of an encoder-decoder two in either stack,",
        "cut and run over two processes: four stages under Interleaved1F1B (which cuts inside the encoder, between the",
        "stacks and inside the decoder) with the attention that transformers takes by itself, two stages under 1F1B",
        "with eager attention; translation, speech and masked models in both ways, others in one of them. Four rows in",
        "two microbatches. The numbers are the largest relative differences from one process among all that the model",
        "returns and all gradients, 1e-7 where transformers' own code computes in float32.",
        "",
        f"Conditions: {_FLOATS}; under Interleaved1F1B two steps whose gradients add up with an evaluation between",
        "them, of three lengths of encoder and decoder, the last two padded on the right where a type takes a mask;",
        "under 1F1B one step; a loss on all tensors that the model returns, no dropout, all weights trained; batch",
        "norms in evaluation mode. *Travels* names what goes along with the hidden state.",
        "",
        "| model type | task | class | 4 stages | 2 stages | | travels |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def images(measured: dict[str, dict]) -> list[str]:
    exact, refused = count(measured)
    rows = []
    for name, result in sorted(measured.items()):
        what = f"refused: {result['refused'].splitlines()[0]}" if "refused" in result else cell(result["error"])
        rows.append(f"| {name} | {result['kind']} | {what.replace('|', '/')} | {result['dtype']} |")
    return [
        "# Pipelining: models of images and text",
        "",
        f"Of {len(rows)} model types of `AutoModelForImageTextToText`, **{exact} train exactly** on two stages with an",
        f"image in every row; refused: {refused}. The others of the class take images in forms that the test kit",
        "does not make, and are not tried.",
        "",
        f"`nox -s sweep`, {VERSIONS}. A four-layer model of the type with random weights, cut and run over two",
        "processes under 1F1B, four rows in two microbatches, each microbatch with its own images. The numbers are the",
        "largest relative differences from one process among the logits and all gradients, the tower's too.",
        "",
        f"Conditions: the attention that transformers takes by itself; {_FLOATS}; one step of one pass; a next-token",
        "loss over every token, no dropout, all weights trained.",
        "",
        "| model type | class | 2 stages | |",
        "|---|---|---|---|",
        *rows,
    ]


def some_ranks(measured: dict[str, dict]) -> list[str]:
    exact = sum(all(not isinstance(error, str) for error in result.values()) for result in measured.values())
    rows = [
        f"| {name} | {cell(result['trained']).replace('|', '/')} | {cell(result['frozen']).replace('|', '/')} |"
        for name, result in sorted(measured.items())
    ]
    return [
        "# Sharded data parallelism: images on some ranks only",
        "",
        f"Of {len(rows)} model types of `AutoModelForImageTextToText` that take text alone too, **{exact} are exact**",
        "with images on one of two ranks. The others of the class take images in forms that the test kit does not",
        "make, and are not tried.",
        "",
        f"`nox -s sweep`, {VERSIONS}. `fsdp2_strategy_parallelize` of a two-layer model of the type, random weights,",
        "over two data ranks; four steps: images on the first rank, on the second, on none, on the first again. The",
        "numbers are the largest relative differences from one process among the logits and all gradients.",
        "",
        "Conditions: the attention that transformers takes by itself; float64; the mean of the logits' squares as",
        "loss; no dropout; all weights trained, or the towers frozen.",
        "",
        "| model type | all trained | towers frozen |",
        "|---|---|---|",
        *rows,
    ]


def tensor(measured: dict[str, dict]) -> list[str]:
    exact, refused = count(measured)
    brought = sum(result["source"] == "transformers" for result in measured.values() if "refused" not in result)
    sequence = sum("sequence" in result for result in measured.values())
    rows = []
    for name in model_types():
        result = measured.get(name)
        if result and "refused" not in result:
            split = (
                f"{result['sequence']:.0e}" if "sequence" in result else f"refused: {why(result['sequence_refused'])}"
            )
            held = f"{result['held']:.0%}"
            if result.get("nan"):
                split += " (its own gradients have NaN)"
            rows.append(
                f"| {name} | {result['kind']} | {result['source']} | {result['error']:.0e} | {split} "
                f"| {result['dtype']} | {held} |"
            )
        else:
            rows.append(f"| {name} | | | {why_not(name, result)} | | | |")
    return [
        "# Tensor and sequence parallelism: every causal language model of transformers",
        "",
        f"Of {len(rows)} model types, **{exact} are exact** at two ranks: {brought} with the plan of transformers",
        f"itself, {exact - brought} with one inferred from their structure. {sequence} of them are exact with",
        f"sequence parallelism too. {refused} are refused before the first collective, {len(NOT_BUILT)} are not",
        "decoders of text by themselves or need more than transformers.",
        "",
        f"`nox -s sweep`, {VERSIONS}. The plan of `get_hf_tp_shard_plan` or `infer_plan`, and that of",
        "`add_sequence_parallelism`, of a four-layer model of the type, over two processes against one. The numbers",
        "are the largest relative differences among the logits and all gradients when `backward()` returns, in",
        "float64 (where parts of most models still compute in float32), or in float32 where the model's own code",
        "mixes the two. *Held* is the share of the parameters on each rank: 50 % and norms where all is sharded, more",
        "where parts stay whole.",
        "",
        CONDITIONS["tensor"],
        "",
        "| model type | class | plan | tensor | with sequence | | held |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def data(measured: dict[str, dict]) -> list[str]:
    layouts = {
        "fsdp2": "two data ranks",
        "hsdp2x2": "two replicas of two shards",
        "fsdp2 x tp2": "two data by two tensor ranks with transformers' plan or an inferred one",
    }
    exact = {name: sum(isinstance(r.get(name), float) for r in measured.values()) for name in layouts}
    shown = [name for name in layouts if exact[name]]
    rows = []
    for name in model_types():
        result = measured.get(name)
        cells = [cell(result[layout]) if result and layout in result else "" for layout in shown]
        if not result:
            cells[0] = why_not(name, None)
        for place, layout in enumerate(shown):
            if result and result.get(f"{layout} nan"):
                cells[place] += " (its own gradients have NaN)"
        kind, dtype = (result["kind"], result["dtype"]) if result else ("", "")
        rows.append(f"| {name} | {kind} | {' | '.join(cells)} | {dtype} |")
    return [
        "# Sharded data parallelism: every causal language model of transformers",
        "",
        f"Of {len(rows)} model types, "
        + ", ".join(f"**{exact[name]} are exact** under {name}" for name in shown)
        + ".",
        "",
        f"`nox -s sweep`, {VERSIONS}. `fsdp2_strategy_parallelize` of a four-layer model of the type over",
        f"{', '.join(layouts[name] for name in shown)}; one step with gradient clipping against one process. The",
        "numbers are the largest relative differences among logits, all gradients after clipping and the norm.",
        "",
        CONDITIONS["data"],
        "",
        f"| model type | class | {' | '.join(shown)} | |",
        f"|---|---|{'---|' * len(shown)}---|",
        *rows,
    ]


def experts(measured: dict[str, dict]) -> list[str]:
    layouts = {
        "ep 2": "two ranks",
        "ep 2 x ep_shard 2": "two ranks with two copies of each half, sharded by FSDP2",
        "ep 4": "four ranks",
        "pp 2 x ep 2": "two data ranks of each of two pipeline stages, where the type can be cut",
    }
    exact = {name: sum(isinstance(r.get(name), float) for r in measured.values()) for name in layouts}
    shown = [name for name in layouts if exact[name]]
    rows = []
    for name, result in sorted(measured.items()):
        cells = [cell(result[layout]) if layout in result else "**failed**" for layout in shown]
        what = f"{result['experts']} in {result['layers']} layers"
        rows.append(f"| {name} | {what} | {result['call']} | {' | '.join(cells)} | {result['dtype']} |")
    return [
        "# Expert parallelism: every mixture of experts among the causal language models of transformers",
        "",
        f"Of {len(rows)} model types with experts, "
        + ", ".join(f"**{exact[name]} are exact** with {name}" for name in shown)
        + ".",
        "",
        f"`nox -s sweep`, {VERSIONS}. `apply_ep` and `apply_fsdp` of a four-layer model of the type, four experts in",
        f"a layer, over {'; '.join(layouts[name] for name in shown)}. Two steps of SGD with the norm of all",
        "gradients clipped, against one process; the numbers are the largest relative differences among logits, loss,",
        "norm, all gradients and all weights, in float64 (where parts of most models still compute in float32), or",
        "in float32 where the model's own code mixes the two; in pipelines of one step, logits and gradients. *Called*",
        "says how: with routing (`routed`), as many rows for every expert (`rows`), or sorted rows through linear maps",
        "(`linear`).",
        "",
        CONDITIONS["experts"],
        "",
        f"| model type | experts | called | {' | '.join(shown)} | |",
        f"|---|---|---|{'---|' * len(shown)}---|",
        *rows,
    ]


def data_heads(measured: dict[str, dict]) -> list[str]:
    tried = {name: result for name, result in measured.items() if "not built" not in result}
    layouts = ("fsdp2", "hsdp2x2")
    exact = {name: sum(isinstance(result.get(name), float) for result in tried.values()) for name in layouts}
    refused = sum(isinstance(result.get("fsdp2"), str) for result in tried.values())
    rows, counts = [], []
    for task, what in TASKS.items():
        mine = {name: result for name, result in sorted(tried.items()) if name.startswith(f"{task}-")}
        exact_here = sum(isinstance(result.get("fsdp2"), float) for result in mine.values())
        two = sum("fsdp2" in result for result in mine.values())
        counts.append(f"| {task} | {what} | {exact_here} | {two} | {len(types_for(task))} |")
        for name, result in mine.items():
            cells = [cell(result[layout]).replace("|", "/") if layout in result else "" for layout in layouts]
            columns = (name.removeprefix(f"{task}-"), task, result["kind"], *cells, result["dtype"])
            rows.append(f"| {' | '.join(columns)} |")
    return [
        "# Sharded data parallelism: encoder-decoders, encoders and heads",
        "",
        f"Of {exact['fsdp2'] + refused} models, **{exact['fsdp2']} are exact** over two data ranks, {refused} are",
        f"refused; over two copies of two shards {exact['hsdp2x2']} are exact.",
        f"{len(measured) - len(tried)} more cannot be had small by the test kit. What has no row is not measured.",
        "Images with text: [on some ranks](some_ranks.md).",
        "",
        "| task | class of transformers | exact | tried | types in all |",
        "|---|---|---|---|---|",
        *counts,
        "",
        f"`nox -s sweep`, {VERSIONS}. `fsdp2_strategy_parallelize` of a model of four layers, of an",
        "encoder-decoder two in either stack, over two data ranks with the attention that transformers takes by",
        "itself, and over two copies of two shards with eager attention. The numbers are the largest relative",
        "differences from one process among all that the model returns, all gradients after clipping, and their norm.",
        "",
        f"Conditions: {_FLOATS}; two steps whose gradients add up with an evaluation between",
        "them; every rank has rows of its own, of another length, all but the first padded on the right where a type",
        "takes a mask; a loss on all tensors that the model returns, no dropout, all weights trained; batch norms in",
        "evaluation mode (in training they are shown by am-fsdp's own tests).",
        "",
        "| model type | task | class | fsdp2 | hsdp2x2 | |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def context(measured: dict[str, dict]) -> list[str]:
    exact = sum(isinstance(result["cp2"], float) for result in measured.values())
    rows = []
    for name in model_types():
        result = measured.get(name)
        if not result:
            rows.append(f"| {name} | | {why_not(name, None)} | |")
        elif isinstance(result["cp2"], float):
            rows.append(f"| {name} | {result['kind']} | {cell(result['cp2'])} | {result['dtype']} |")
        else:
            rows.append(f"| {name} | {result['kind']} | refused: {why(result['cp2'])} | |")
    return [
        "# Context parallelism: every causal language model of transformers",
        "",
        f"Of {len(rows)} model types, **{exact} are exact** over two context ranks with `p2p`; the rest are refused by",
        "name, because something in them mixes tokens in another way than attention that transformers' registry names,",
        "recurrence or convolution. Those with image or audio towers are exact on text, and refuse to run a tower.",
        "",
        f"`nox -s sweep`, {VERSIONS}. `apply_cp` of a small model of the type; the numbers are the",
        "largest relative differences from one process among logits, loss and all gradients. They are near 1e-7 where",
        "transformers' own softmax or recurrence computes in float32.",
        "",
        CONDITIONS["context"],
        "",
        "| model type | class | cp 2 | |",
        "|---|---|---|---|",
        *rows,
    ]


def encoders(measured: dict[str, dict]) -> list[str]:
    tried = {name: result for name, result in measured.items() if "not_built" not in result}
    exact, refused = count(tried)
    rows, counts = [], []
    for task, what in {"images": "AutoModelForImageTextToText, with an image in every row", **TASKS}.items():
        mine = {name: result for name, result in measured.items() if name.startswith(f"{task}-")}
        built = {name: result for name, result in mine.items() if name in tried}
        numbers = (*count(built), len(mine) - len(built))
        counts.append(f"| {task} | {what} | {' | '.join(map(str, numbers))} |")
    for name, result in sorted(tried.items()):
        task, model_type = name.split("-", 1)
        tensor = cell(result["error"]) if "error" in result else f"refused: {why(result['refused'])}"
        sequence = cell(result["sequence"]) if "sequence" in result else ""
        if "sequence_refused" in result:
            sequence = f"refused: {why(result['sequence_refused'])}"
        elif result.get("whole"):
            sequence += f" (whole in {', '.join(result['whole'])})"
        held = f"{result['held']:.0%}" if "held" in result else ""
        form = f"{result['dtype']}, {result['attention'] or 'own'}"
        whole = ", ".join(result.get("whole_stacks", []))
        rows.append(f"| {model_type} | {task} | {result['kind']} | {tensor} | {sequence} | {held} | {whole} | {form} |")
    with_sequence = sum("sequence" in result for result in tried.values())
    return [
        "# Tensor and sequence parallelism: images, encoder-decoders, encoders and heads",
        "",
        f"Of {len(tried)} models, **{exact} are exact** at two ranks, {with_sequence} of them with sequence",
        f"parallelism too; {refused} are refused. {len(measured) - len(tried)} more cannot be had small by the test",
        "kit. What has no row is not measured.",
        "",
        "| task | class of transformers | exact | refused | not built |",
        "|---|---|---|---|---|",
        *counts,
        "",
        "Of heads for sequences, tokens and questions, the types are here that are no causal language models; the",
        "stacks of those are in [their own table](tensor.md).",
        "",
        f"`nox -s sweep`, {VERSIONS}. The plan of `resolve_plan(model, infer=True, example_inputs=...)`, and that of",
        "`add_sequence_parallelism`, of a model of four layers, of an encoder-decoder two in either stack, over two",
        "processes against one. The numbers are the largest relative differences of the loss and of all gradients.",
        "*Held* is the share of the parameters on each rank, *whole* names the stacks of layers of which every rank",
        "has all: those that the inputs do not run, and those of which nothing was shown.",
        "",
        "Conditions: eager attention, or what transformers takes by itself (*own*: sdpa, where a type has it);",
        f"{_FLOATS}; one step of one pass; natural inputs and labels of the task, some of which do not count; no",
        "dropout, all weights trained; batch norms in evaluation mode.",
        "",
        "| model type | task | class | tensor | with sequence | held | whole | |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def context_heads(measured: dict[str, dict]) -> list[str]:
    tried = {name: result for name, result in measured.items() if not str(result["cp2"]).startswith("not built")}
    exact = sum(isinstance(result["cp2"], float) for result in tried.values())
    rows = []
    for name, result in sorted(tried.items()):
        head, model_type = name.split("-", 1)
        error = result["cp2"]
        what = cell(error) if isinstance(error, float) else f"refused: {why(error)}"
        rows.append(f"| {model_type} | {head} | {result['kind']} | {result['attention']} | {what} |")
    return [
        "# Context parallelism: heads that are not next-token heads",
        "",
        f"Of {len(rows)} heads, **{exact} are exact** over two context ranks with `p2p`; the rest are refused by name.",
        f"{len(measured) - len(tried)} more cannot be built or run small by themselves and are not here.",
        "",
        f"`nox -s sweep`, {VERSIONS}. `apply_cp` of a two-layer model with a head for sequences, tokens, masked tokens",
        "or questions; the numbers are the largest relative differences from one process among the loss, what the",
        "model returns and all gradients.",
        "",
        "Conditions: the attention that a row names; float64, or float32 where the model's own code mixes the two; one",
        "step of one pass; ids and labels, of tokens more on one rank than on the other; no dropout, all weights",
        "trained.",
        "",
        "| model type | head | class | attention | cp 2 |",
        "|---|---|---|---|---|",
        *rows,
    ]


def context_images(measured: dict[str, dict]) -> list[str]:
    exact = sum(isinstance(result["cp2"], float) for result in measured.values())
    rows = []
    for name in natural_types():
        error = measured[name]["cp2"] if name in measured else "**failed**"
        rows.append(f"| {name} | {f'refused: {why(error)}' if 'refused' in str(error) else cell(error)} |")
    return [
        "# Context parallelism: models that take images",
        "",
        f"Of {len(rows)} model types, **{exact} are exact** over two context ranks with `p2p`; the rest are refused by",
        "name, or do not run so small. Each rank makes the embeddings of all images; they are cut where the layers of",
        "the text begin. Features that enter several layers (deepstack) go to the ranks of their tokens; tokens of an",
        "image may see each other.",
        "",
        f"`nox -s sweep`, {VERSIONS}. `apply_cp` and FSDP2 over the context axis, of a small model of the type; the",
        "numbers are the largest relative differences from one process of the loss and all gradients.",
        "",
        "Conditions: the attention that transformers takes by itself; float64; one step each of two rows, two padded",
        "rows, four rows, all with one image each, and text alone; a next-token loss; no dropout, all weights trained.",
        "",
        "| model type | cp 2 |",
        "|---|---|",
        *rows,
    ]


def composed(measured: dict[str, dict]) -> list[str]:
    trained = [result for result in measured.values() if "saved" not in result]
    models = list(dict.fromkeys(result["model"] for result in trained))
    found = {(result["model"], compositions.name(result)): result["error"] for result in trained}
    layouts = sorted(compositions.product(), key=compositions.ranks)
    rows = []
    for layout in layouts:
        name = compositions.name(layout)
        cells = [cell(found[model, name]) if (model, name) in found else "" for model in models]
        if any(cells):
            rows.append(f"| {compositions.ranks(layout)} | {name} | {' | '.join(cells)} |")
    exact = sum(result["error"] <= 1e-5 for result in trained)
    lines = [
        "# Compositions: every product of the axes on up to eight ranks",
        "",
        f"**{exact} of {len(trained)} compositions train like one process**: pipeline stages, replicas, shards,",
        "context, tensor (`tp2sp`: with sequence parallelism) and expert ranks, two of each (experts two or four),",
        "wherever they fit eight ranks.",
        "",
        f"`nox -s compositions`, {VERSIONS}, gloo. Four-layer models in float64: a Qwen3 with tied embeddings, a",
        "Mistral with two key heads and a sliding window shorter than the sequence, a Qwen2-MoE with shared experts,",
        "a Llama with LoRA adapters. Three steps of AdamW with the global norm clipped to 0.1. The numbers are the",
        "largest relative differences from one process among the losses, all gradients and the norm of each step, and",
        "all weights after the third. The norm is returned in float32, whose rounding, up to 6e-08, is most of what is",
        "seen here; norms and softmax of transformers compute in float32 too. Empty: experts of a model without, or",
        "more expert ranks than a stage has; those are refused, which is tested.",
        "",
        CONDITIONS["compositions"],
        "",
        f"| ranks | composition | {' | '.join(models)} |",
        f"|---|---|{'---|' * len(models)}",
        *rows,
        "",
        "## Saved at one layout, resumed at another",
        "",
        "Two steps and a checkpoint in the layout of the row, loaded into other weights in the layout of the column,",
        "one more step: the largest relative difference of the weights from three steps of one process.",
    ]
    for model in dict.fromkeys(result["model"] for result in measured.values() if "saved" in result):
        pairs = {
            (r["saved"], r["resumed"]): r["error"] for r in measured.values() if r["model"] == model and "saved" in r
        }
        names = list(dict.fromkeys(saved for saved, _ in pairs))
        lines += ["", f"| {model} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
        lines += [f"| {row} | {' | '.join(cell(pairs[row, column]) for column in names)} |" for row in names]
    return lines


def cell(result: float | str) -> str:
    return result.splitlines()[0][:140] if isinstance(result, str) else f"{result:.0e}"


def why(message: str) -> str:
    return message.splitlines()[0].split(": ", 2)[-1].replace("|", "/")[:140]


def count(measured: dict[str, dict]) -> tuple[int, int]:
    refused = sum("refused" in result for result in measured.values())
    return len(measured) - refused, refused


def why_not(name: str, result: dict | None) -> str:
    if name in NOT_BUILT:
        return f"not built: {NOT_BUILT[name]}"
    return f"refused: {result['refused'].splitlines()[0]}" if result else "**failed**"


if __name__ == "__main__":
    main(*sys.argv[1:])
