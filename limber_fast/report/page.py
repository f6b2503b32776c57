"""One self-contained HTML page: no script, no external resource, readable without either."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light; }
body { font: 17px/1.55 Georgia, 'Iowan Old Style', 'Times New Roman', serif; color: #1d1d1b; background: #fdfcf9;
       max-width: 62rem; margin: 3rem auto; padding: 0 1.4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #d9d5ca; }
p.lead { font-size: 1.15rem; color: #3c3a35; }
p, li { max-width: 46rem; }
table { border-collapse: collapse; font: 15px/1.4 system-ui, sans-serif; margin: 1rem 0;
        font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid #e6e2d8; }
th { font-weight: 600; border-bottom: 2px solid #8a867b; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.best { font-weight: 700; }
img.chart { width: 100%; height: auto; margin: .5rem 0; }
.note { font: 14px/1.5 system-ui, sans-serif; color: #5d5a52; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.card { display: flex; gap: .8rem; border: 1px solid #e0dcd1; border-radius: 6px; padding: .7rem; background: #fff;
        font: 13px/1.35 system-ui, sans-serif; }
.card img { width: 64px; height: 64px; flex: none; }
.card img.photo { width: 9rem; height: auto; align-self: start; }
.card div.names { flex: 1; min-width: 0; }
.card .truth { font-weight: 700; margin-bottom: .25rem; }
.guess { display: flex; justify-content: space-between; gap: .5rem; padding: 0 .3rem; margin: 1px 0;
         border-radius: 3px; }
.guess span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.guess.right { color: #0d5a2b; font-weight: 700; }
@media print { body { background: #fff; } h2 { break-after: avoid; } .card, img.chart { break-inside: avoid; } }
"""


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a data: address of media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def escape(text: object) -> str:
    return html.escape(str(text))


def paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{escape(text)}</p>' if css else f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a header; the first column is text, the others are figures."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def chart(svg: bytes, description: str) -> str:
    """A drawn chart; the description says in words what it shows."""
    return f'<img class="chart" alt="{escape(description)}" src="{data_uri(svg, "image/svg+xml")}">'


def card(png: bytes, truth: str, guesses: Sequence[tuple[str, float]]) -> str:
    """A test image with its best names: the bar behind a name is its probability, the right name is marked."""
    lines = []
    for name, probability in guesses:
        right, percent = name == truth, 100 * probability
        colour = "#bfe5cb" if right else "#e9e6de"
        bar = f"background: linear-gradient(to right, {colour} {percent:.1f}%, transparent {percent:.1f}%)"
        mark = "✓ " if right else ""
        lines.append(
            f'<div class="guess{" right" if right else ""}" style="{bar}">'
            f"<span>{mark}{escape(name)}</span><span>{percent:.0f}%</span></div>"
        )
    image = f'<img alt="{escape(truth)}" src="{data_uri(png, "image/png")}">'
    names = f'<div class="truth">{escape(truth)}</div>{"".join(lines)}'
    return f'<div class="card">{image}<div class="names">{names}</div></div>'


def photo(image: str | None, title: str, lines: Sequence[tuple[str, object]]) -> str:
    """A picture (a data: address, None where there is none) beside named lines of text."""
    shown = "" if image is None else f'<img class="photo" alt="{escape(title)}" src="{image}">'
    body = "".join(f"<div><b>{escape(name)}</b> {escape(text)}</div>" for name, text in lines)
    return f'<div class="card">{shown}<div class="names"><div class="truth">{escape(title)}</div>{body}</div></div>'


def grid(cards: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def section(identifier: str, title: str, *content: str) -> str:
    return f'<section id="{identifier}">\n<h2>{escape(title)}</h2>\n' + "\n".join(content) + "\n</section>"


def page(title: str, *content: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(content)
        + "\n</body>\n</html>\n"
    )
