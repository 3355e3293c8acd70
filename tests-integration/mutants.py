"""Would the tests notice? Change one thing in the code that sums, masks, places or sends, and run its tests.

python tests-integration/mutants.py                        150 changes, a fixed choice; the table goes to stdout
python tests-integration/mutants.py --number 20 --seed 3   others
python tests-integration/mutants.py --only am_moe          of one package

A change is one of: an operator or a comparison replaced by its neighbour, a number by the next one, a truth by its
opposite, a condition negated, a statement left out, a reduction by another one. A process that has imported torch and
transformers forks for each; the child imports our packages anew, one module of them with the change, and runs the
tests of that module until one fails. Each module's tests are run first without a change, and must pass.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import pathlib
import random
import signal
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[1]
# A module, and the tests that are there to notice: options of pytest.
TESTS = {
    "am_tp_styles.communication": [
        "am-tp-styles/tests/test_communication.py",
        "am-tp-styles/tests/test_collectives.py",
    ],
    "am_tp_styles.layout": ["am-tp-styles/tests/test_layout.py", "am-tp-styles/tests/test_wrapped.py"],
    "am_tp_styles.edges": [
        "am-tp-styles/tests/test_heads.py",
        "am-tp-styles/tests/test_wrapped.py",
        "am-tp-styles/tests/test_communication.py",
    ],
    "am_tp_styles.summed_together": [
        "am-tp-styles/tests/test_communication.py",
        "am-tp-plans/tests/test_local.py::test_gradients_of_whole_parameters_are_summed_in_one_go_per_backward",
        "am-tp-plans/tests/test_local.py::test_gradients_are_whole_with_recomputed_layers",
        "am-tp-plans/tests/test_local.py::test_gradients_are_whole_where_fsdp_holds_the_model",
    ],
    "am_tp_styles.dropout": ["am-tp-styles/tests/test_lora.py", "am-tp-plans/tests/test_random_numbers.py"],
    "am_tp_plans.styles.loss": ["am-tp-plans/tests/test_loss.py"],
    "am_tp_plans.styles.heads": [
        "am-tp-plans/tests/test_shared_heads.py::test_an_axis_that_heads_do_not_fit_is_refused_with_those_that_fit",
        "am-tp-plans/tests/test_shared_heads.py::test_a_plan_that_would_be_wrong_is_refused_on_every_rank_and_changes_nothing",
        "am-tp-plans/tests/test_shared_heads.py::test_a_report_says_which_heads_are_shared",
        "am-tp-plans/tests/test_shared_heads.py::test_the_smallest_axis_that_heads_fit",
        "am-tp-plans/tests/test_shared_heads.py::test_two_key_value_heads_on_four_ranks",
    ],
    "am_tp_plans.styles.fused": ["am-tp-plans/tests/test_strided_shards.py", "am-tp-plans/tests/test_local.py"],
    "am_tp_plans.styles.random_numbers": ["am-tp-plans/tests/test_random_numbers.py"],
    "am_tp_plans.proof.shares": ["am-tp-plans/tests/test_shares.py", "am-tp-plans/tests/test_mixing.py"],
    "am_fsdp.layout.clipping": ["am-fsdp/tests/test_strategy.py", "am-fsdp/tests/test_layouts.py"],
    "am_fsdp.layout.replicas": ["am-fsdp/tests/test_replicas.py"],
    "am_fsdp.layout.same_towers": ["am-fsdp/tests/test_some_ranks.py"],
    "am_fsdp.layout.units": ["am-fsdp/tests/test_strategy.py"],
    "am_moe.expert_parallel.ordering": ["am-moe/tests/test_ordering.py", "am-moe/tests/test_dispatch.py"],
    "am_moe.expert_parallel.dispatchers.all_to_all": ["am-moe/tests/test_dispatch.py"],
    "am_moe.expert_parallel.dispatchers.all_gather": ["am-moe/tests/test_dispatch.py"],
    "am_moe.expert_parallel.collectives": ["am-moe/tests/test_dispatch.py", "am-moe/tests/test_expert_parallel.py"],
    "am_moe.expert_parallel.common_form": [
        "am-moe/tests/test_forms.py",
        "am-moe/tests/test_compute.py",
        "am-moe/tests/test_expert_parallel.py",
    ],
    "am_moe.expert_parallel.load": ["am-moe/tests/test_load.py"],
    "am_moe.expert_parallel.shared_tokens": [
        "am-moe/tests/test_expert_parallel.py",
        "am-moe/tests/test_parallelize.py",
    ],
    "am_moe.context_parallel.plan": ["am-moe/tests/test_context_parallel_plan.py"],
    "am_moe.context_parallel.kernel": [
        "am-moe/tests/test_context_parallel_plan.py",
        "am-moe/tests/test_context_parallel.py::test_every_type_is_exact_on_two_ranks[llama]",
        "am-moe/tests/test_context_parallel.py::test_every_type_is_exact_on_two_ranks[gpt_oss]",
    ],
    "am_moe.context_parallel.ring": [
        "am-moe/tests/test_context_parallel.py::test_every_type_is_exact_on_two_ranks[gpt_oss]",
        "am-moe/tests/test_context_parallel.py::test_padding_on_either_side_is_exact_for_the_tokens_that_are_none",
    ],
    "am_moe.context_parallel.transport": [
        "am-moe/tests/test_context_parallel.py::test_padding_on_either_side_is_exact_for_the_tokens_that_are_none"
    ],
    "am_pipeline.schedule.order": ["am-pipeline/tests/test_order.py"],
    "am_pipeline.step.shared": ["am-pipeline/tests/test_shared.py"],
    "am_pipeline.step.tokens": ["am-pipeline/tests/test_tokens.py"],
    "am_pipeline.step.gradients": ["am-pipeline/tests/test_tokens.py", "am-pipeline/tests/test_shared.py"],
    "am_pipeline.cut.crossing": ["am-pipeline/tests/test_provenance.py", "am-pipeline/tests/test_cut.py"],
}
# Changes that no test can notice, with the reason: `module:line text` as the table shows it.
EQUAL: dict[str, str] = {}
SECONDS = 240
HEAVY = ("hypothesis", "pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.pipelining")
HEAVY += ("torch.distributed.tensor.parallel", "torch.testing._internal.distributed.fake_pg")
HEAVY += ("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "peft")

_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult}
_BINARY |= {ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}
_COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_COMPARED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
_NAMES = {"SUM": "MAX", "AVG": "SUM", "MAX": "MIN", "MIN": "MAX"}


def changes(tree: ast.Module) -> Iterator[tuple[int, str, int]]:
    """Every change of a module: its line, what it is, and the place of the node among all."""
    for place, node in enumerate(ast.walk(tree)):
        if not isinstance(node, (ast.expr, ast.stmt)):
            continue
        changed = copy.deepcopy(node)
        if _change(changed):
            yield node.lineno, f"{_short(ast.unparse(node))}  ->  {_short(ast.unparse(changed))}", place


def changed_at(module: str, place: int) -> ast.Module:
    """The module with one node changed."""
    tree = ast.parse(source_of(module).read_text())
    _change(next(itertools.islice(ast.walk(tree), place, None)))
    return ast.fix_missing_locations(tree)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) < 50 else f"{line[:47]}..."


def _change(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        if any(
            isinstance(side, (ast.Constant, ast.JoinedStr)) and not _is_number(side) for side in (node.left, node.right)
        ):
            return False
        node.op = _BINARY[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARED:
        node.ops[0] = _COMPARED[type(node.ops[0])]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        node.op = ast.UAdd()
    elif isinstance(node, ast.Constant) and _is_number(node):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.If, ast.IfExp)):
        node.test = ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        node.attr = _NAMES[node.attr]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        node.value = ast.Constant(None)
    else:
        return False
    return True


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float))


def matters(tree: ast.Module, line: int) -> bool:
    """Whether a line computes: what a message says, checks of arguments and declarations of types do not count."""
    for node in ast.walk(tree):
        inside = isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or line)
        if inside and isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.AnnAssign, ast.Assert)):
            return False
        if inside and isinstance(node, ast.If) and any(isinstance(s, ast.Raise) for s in node.body):
            return False
        if (
            inside
            and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.lineno <= line < node.body[0].lineno
        ):
            return False
        if inside and isinstance(node, ast.FunctionDef) and node.name in ("__repr__", "__str__", "_fake", "fake"):
            return False
    return True


def chosen(number: int, seed: int, only: str) -> list[tuple[str, int, str, int]]:
    """As many from each module as from any other, as far as it has them; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311
    found = {}
    for module in TESTS:
        if module.startswith(only):
            tree = ast.parse(source_of(module).read_text())
            some = [change for change in changes(tree) if matters(tree, change[0])]
            found[module] = rng.sample(some, len(some))
    picked = []
    while len(picked) < number and any(found.values()):
        for module, left in found.items():
            if left and len(picked) < number:
                picked.append((module, *left.pop()))
    return sorted(picked, key=lambda change: (list(TESTS).index(change[0]), change[1]))


def source_of(module: str) -> pathlib.Path:
    package = module.partition(".")[0].replace("_", "-")
    return ROOT / "packages" / package / "src" / pathlib.Path(*module.split(".")).with_suffix(".py")


class _Changed(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    """Imports one module from a changed tree."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        self.module, self.tree = module, tree

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, origin=str(source_of(name))) if name == self.module else None

    def exec_module(self, module) -> None:
        module.__file__ = str(source_of(self.module))
        exec(compile(self.tree, module.__file__, "exec"), module.__dict__)  # noqa: S102


def run(module: str, tree: ast.Module | None) -> tuple[str, float]:
    """What the tests of a module say to a change of it: passed, failed or hung; and after how many seconds."""
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        sink = os.open(os.environ.get("AM_MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        code = 70
        try:
            if tree is not None:
                sys.meta_path.insert(0, _Changed(module, tree))
            import pytest

            tests = [str(ROOT / "packages" / test) for test in TESTS[module]]
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
        finally:
            os._exit(code)
    while time.monotonic() - begun < SECONDS:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            passed = os.waitstatus_to_exitcode(status) == 0
            return "passed" if passed else "failed", time.monotonic() - begun
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung", time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--number", type=int, default=150, help="changes to try")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", default="", help="modules whose names start so")
    parser.add_argument("--out", type=pathlib.Path, help="a file for what was found, a JSON line each")
    arguments = parser.parse_args()
    picked = chosen(arguments.number, arguments.seed, arguments.only)
    for name in HEAVY:  # each child would take seconds for them
        importlib.import_module(name)

    usual = {
        module: run(module, None) for module in tqdm({m: None for m, *_ in picked}, desc="unchanged", disable=None)
    }
    broken = [module for module, (how, _) in usual.items() if how != "passed"]
    if broken:
        print(f"the tests of {', '.join(broken)} do not pass as they are", file=sys.stderr)
        return 2
    survived, caught = [], 0
    for module, line, text, node in tqdm(picked, desc="changes", disable=None):
        how, seconds = run(module, changed_at(module, node))
        place = f"{module}:{line} {text}"
        caught += how != "passed"
        if how == "passed":
            survived.append(place)
        if arguments.out:
            with arguments.out.open("a") as out:
                print(json.dumps({"change": place, "tests": how, "seconds": round(seconds, 1)}), file=out, flush=True)
    unknown = [place for place in survived if place not in EQUAL]
    counted = len(picked) - (len(survived) - len(unknown))
    print(f"{caught} of {counted} changes are noticed, {100 * caught / max(counted, 1):.0f} %")
    for place in survived:
        print(f"  survived: {place}" + (f"  ({EQUAL[place]})" if place in EQUAL else ""))
    return len(unknown) > 0.05 * counted


if __name__ == "__main__":
    sys.exit(main())
