"""Sections of text, tables and pictures, written as Markdown or as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
td.text, th.text { text-align: left; }
img { max-width: 100%; }
pre { background: #f5f5f5; padding: .7rem; overflow: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } th, td { border-color: #444; } pre { background: #222; }
  img { background: white; }
}
"""


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
    lines = [f"# {title}"]
    for section in sections:
        lines.append(f"## {section.title}")
        lines += [_markdown(part, folder) for part in section.parts]
    return "\n\n".join(lines) + "\n"


def to_html(title: str, sections: Sequence[Section]) -> str:
    """The document as HTML with its pictures inside."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [_html(part) for part in section.parts]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _markdown(part: str | Table | Picture | Code, folder: Path) -> str:
    if isinstance(part, Table):
        rules = ["---" if index < part.text_columns else "---:" for index in range(len(part.columns))]
        lines = [part.columns, rules, *part.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    if isinstance(part, Picture):
        return f"![{part.caption}]({part.path.relative_to(folder).as_posix()})"
    if isinstance(part, Code):
        return "\n".join(f"    {line}" for line in part.text.splitlines())
    return part


def _html(part: str | Table | Picture | Code) -> str:
    if isinstance(part, Table):
        rows = [
            _html_row(part.columns, "th", part.text_columns),
            *(_html_row(r, "td", part.text_columns) for r in part.rows),
        ]
        return f"<table>\n{chr(10).join(rows)}\n</table>"
    if isinstance(part, Picture):
        data = base64.b64encode(part.path.read_bytes()).decode()
        caption = html.escape(part.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    if isinstance(part, Code):
        return f"<pre>{html.escape(part.text)}</pre>"
    return f"<p>{html.escape(part)}</p>"


def _html_row(cells: Sequence[str], tag: str, text_columns: int) -> str:
    words = ' class="text"'
    inner = (
        f"<{tag}{words if index < text_columns else ''}>{html.escape(cell)}</{tag}>" for index, cell in enumerate(cells)
    )
    return f"<tr>{''.join(inner)}</tr>"
