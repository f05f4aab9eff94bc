"""Sections of text, tables and pictures, written as Markdown or as one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, Template


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first `text_columns` columns are words, the others figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Picture:
    """A PNG file below the folder of the document."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is."""

    text: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs (plain strings), tables, pictures and code under it."""

    title: str
    parts: Sequence[str | Table | Picture | Code]


def to_markdown(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The document as Markdown; pictures are named relative to `folder`."""
    return _template("document.md.j2").render(title=title, sections=sections, folder=folder)


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The document as HTML with its pictures inside."""
    return _template("document.html.j2").render(title=title, sections=sections)


def _template(name: str) -> Template:
    templates = Environment(
        loader=PackageLoader("xlstm_rl.bench"),
        autoescape=name.endswith(".html.j2"),
        trim_blocks=name.endswith(".html.j2"),
        lstrip_blocks=name.endswith(".html.j2"),
        keep_trailing_newline=True,
    )
    templates.filters["cell"] = lambda text: text.replace("|", "\\|")
    templates.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return templates.get_template(name)
