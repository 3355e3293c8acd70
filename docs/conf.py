"""Sphinx settings of the site: `nox -s docs` builds it into `build/docs`."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from sphinx.pycode import ModuleAnalyzer

PACKAGES = ("am_tp_styles", "am_tp_plans", "am_fsdp", "am_moe", "am_pipeline")

project = "Parallelism for Hugging Face models"
html_title = project
html_theme = "furo"
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files, html_js_files = ["site.css"], ["copy.js"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["examples"]
myst_heading_anchors = 3
highlight_language = "none"  # a block that names no language is a drawing

default_role = "py:obj"  # text in single backticks is code, and a link where it names something of ours
autodoc_typehints = "signature"
autodoc_member_order = "groupwise"
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_use_rtype = False
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"(?!am_\w+\.\w+$).*"),  # types of others, which an offline build cannot look up, and internal ones
]

PUBLIC = {name for package in PACKAGES for name in importlib.import_module(package).__all__}
COLLECTIVES = re.compile(r"^Collectives( \([^)]*\))?: ((?:.+\n?)+)", re.MULTILINE)
RAISES_WHEN = re.compile(r"^Raises, .*:$", re.MULTILINE)
PLURAL = re.compile(r"(`[^`\n]+`)(?=\w)")


def keep_public(_app: Any, _what: str, name: str, _thing: Any, _skip: bool, _options: Any) -> bool | None:
    """What `__all__` names is shown, also with an underscore or without a docstring."""
    return False if name in PUBLIC else None


def as_napoleon_reads(_app: Any, _what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """`Collectives: text` becomes a field beside those of `Args:` and `Raises:`; `Model`s keeps its plural."""
    if lines[0] == "Attributes:":  # all that some dataclasses say
        end = lines.index("") if "" in lines else len(lines)
        lines[1:end] = [f"    {line}" for line in lines[1:end]]
    text = COLLECTIVES.sub(_field, "\n".join(lines))
    text = RAISES_WHEN.sub("Raises:", text)
    lines[:] = PLURAL.sub(r"\1\\ ", text).split("\n")


def _field(paragraph: re.Match[str]) -> str:
    axis, text = paragraph.groups()
    return f":Collectives{axis or ''}: {' '.join(text.split())}\n"


def add_data(_app: Any, page: str, source: list[str]) -> None:
    """Public names that are no class or function: autodoc leaves those out where another module made them."""
    package = page.removeprefix("api/")
    if package not in PACKAGES:
        return
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing):
            about = _about(name, package) or type(thing).__doc__
            source[0] += (
                f"\n```{{eval-rst}}\n.. py:currentmodule:: {package}\n\n.. py:data:: {name}\n\n   {about}\n```\n"
            )


def _about(name: str, package: str) -> str:
    """The docstring below the line that makes a name, in whichever module that is."""
    for module in [m for m in sys.modules if m.startswith(f"{package}.")]:
        documented = ModuleAnalyzer.for_module(module).find_attr_docs()
        if ("", name) in documented:
            return " ".join(documented["", name]).strip()
    return ""


def setup(app: Any) -> None:
    app.connect("source-read", add_data)
    app.connect("autodoc-skip-member", keep_public)
    app.connect("autodoc-process-docstring", as_napoleon_reads, priority=400)  # before napoleon's
