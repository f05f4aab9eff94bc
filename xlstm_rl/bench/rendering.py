"""Writing the card and its figures."""

from __future__ import annotations

from pathlib import Path

from xlstm_rl.agents.archive import write_whole
from xlstm_rl.bench.card import card_sections
from xlstm_rl.bench.documents import to_html, to_markdown
from xlstm_rl.bench.figures import draw_all
from xlstm_rl.bench.results import Results
from xlstm_rl.configs import ConfigError


def render(results: Results, out: Path) -> None:
    """Write card.md, card.html and figures/ to a folder.

    Raises:
        ConfigError: no run has finished yet.
    """
    if not results.records:
        raise ConfigError(f"{out} has no finished run to show; go on with `xlstm-rl bench run`")
    figures = out / "figures"
    draw_all(results, figures)
    sections = card_sections(results, figures)
    title = f"Benchmark {results.name}"
    write_whole(out / "card.md", to_markdown(title, sections, out).encode())
    write_whole(out / "card.html", to_html(title, sections).encode())
