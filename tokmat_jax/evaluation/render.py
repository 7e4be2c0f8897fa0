"""A report as blocks, rendered in two formats: Markdown and one self-contained HTML page.

Blocks contain plain text: rendering escapes all text from models and users.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokmat_jax.view.terminal import visible

Plots = dict[str, str]
"""SVG by name."""


class Block(Protocol):
    """A piece of a report."""

    def markdown(self) -> str:
        """As Markdown; a plot is the file `plots/NAME.svg`."""
        ...

    def html(self, plots: Plots) -> str:
        """As HTML, with the plots inside."""
        ...


@dataclass(frozen=True)
class Heading:
    """The heading of a section."""

    text: str
    level: int = 2

    def markdown(self) -> str:
        return f"{'#' * self.level} {self.text}"

    def html(self, plots: Plots) -> str:  # noqa: ARG002
        return f"<h{self.level}>{_shown(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Paragraph:
    """Sentences; a warning is highlighted."""

    text: str
    is_warning: bool = False

    def markdown(self) -> str:
        return f"**{self.text}**" if self.is_warning else self.text

    def html(self, plots: Plots) -> str:  # noqa: ARG002
        return f"<p{' class=warning' if self.is_warning else ''}>{_shown(self.text)}</p>"


@dataclass(frozen=True)
class Table:
    """Rows with as many cells as the header; the first cell names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    in_words: bool = False
    """Whether its cells hold sentences, which may be broken."""

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def html(self, plots: Plots) -> str:  # noqa: ARG002
        head = "".join(f"<th scope=col>{_shown(cell)}</th>" for cell in self.header)
        body = "".join(f"<tr><th scope=row>{_shown(row[0])}</th>"
                       + "".join(f"<td>{_shown(cell)}</td>" for cell in row[1:]) + "</tr>" for row in self.rows)
        words = " class=answers" if self.in_words else ""
        return f"<div class=wide><table{words}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


@dataclass(frozen=True)
class Plot:
    """The plot called `name`."""

    name: str

    def markdown(self) -> str:
        return f"![{self.name}](plots/{self.name}.svg)"

    def html(self, plots: Plots) -> str:
        return f"<figure role=img aria-label='{_shown(self.name)}'>{plots[self.name]}</figure>"


@dataclass(frozen=True)
class Bullets:
    """A bullet list."""

    items: Sequence[str]

    def markdown(self) -> str:
        return "\n".join(f"- {item}" for item in self.items)

    def html(self, plots: Plots) -> str:  # noqa: ARG002
        return "<ul>" + "".join(f"<li>{_shown(item)}</li>" for item in self.items) + "</ul>"


@dataclass(frozen=True)
class Quote:
    """Model text in spans (text, kind): `prompt`, `new`, `tail`, or `mark` for highlighted text."""

    spans: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        marks = {"prompt": "{}", "new": "{}", "tail": " {}", "mark": "[{}]"}
        return f"> {_code(''.join(marks[kind].format(text) for text, kind in self.spans))}"

    def html(self, plots: Plots) -> str:  # noqa: ARG002
        tags = {"prompt": "b", "new": "span", "tail": "i", "mark": "mark"}
        return "<div class=text>" + "".join(
            f"<{tags[kind]}>{_shown(text)}</{tags[kind]}>" for text, kind in self.spans) + "</div>"


@dataclass(frozen=True)
class Beside:
    """Quotes with titles, side by side where the page is wide enough."""

    titles: Sequence[str]
    quotes: Sequence[Quote]

    def markdown(self) -> str:
        return "\n\n".join(f"**{title}**\n\n{quote.markdown()}"
                           for title, quote in zip(self.titles, self.quotes, strict=True))

    def html(self, plots: Plots) -> str:
        return "<div class=beside>" + "".join(
            f"<section><h4>{_shown(title)}</h4>{quote.html(plots)}</section>"
            for title, quote in zip(self.titles, self.quotes, strict=True)) + "</div>"


@dataclass(frozen=True)
class Folded:
    """Blocks under a title; in HTML they are collapsed until they are opened."""

    title: str
    blocks: Sequence[Block]

    def markdown(self) -> str:
        return "\n\n".join([f"**{self.title}**", *(block.markdown() for block in self.blocks)])

    def html(self, plots: Plots) -> str:
        held = "".join(block.html(plots) for block in self.blocks)
        return f"<details><summary>{_shown(self.title)}</summary>{held}</details>"


def _shown(text: str) -> str:
    """`text` escaped for HTML: neither its markup nor its characters for writing direction take effect."""
    return html.escape(visible(text))


def _code(text: str) -> str:
    """Text as a code span on one line; it may contain back-ticks."""
    longest = max(map(len, "".join(c if c == "`" else " " for c in text).split()), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {' '.join(text.split())} {fence}"


def to_markdown(blocks: Sequence[Block]) -> str:
    """`blocks` as Markdown."""
    return visible("\n\n".join(block.markdown() for block in blocks)) + "\n"


def to_html(title: str, blocks: Sequence[Block], plots: Plots) -> str:
    """`blocks` as a self-contained page."""
    # The policy stops the browser from loading or running anything, whatever text is in the page.
    return ("<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
            "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
            "<meta name=viewport content='width=device-width, initial-scale=1'><link rel=icon href='data:,'>"
            f"<title>{_shown(title)}</title><style>{_CSS}</style></head><body>\n"
            + "\n".join(block.html(plots) for block in blocks) + "\n</body></html>\n")


_CSS = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fdfdfb; --soft: #6b6b70; --line: #d9d9d4; --mark: #ffe9a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --paper: #17181a; --soft: #a0a0a6; --line: #3a3b3f; --mark: #5c4a12; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; }
tbody th { text-align: left; position: sticky; left: 0; background: var(--paper); font-weight: 500; }
figure { margin: 1rem 0; padding: .6rem; background: #fff; border: 1px solid var(--line); border-radius: .5rem;
  overflow-x: auto; } figure svg { max-width: 100%; height: auto; }
.warning { border-left: .3rem solid #d1495b; padding: .4rem .8rem; font-weight: 600; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-left: .2rem solid var(--line); padding-left: .8rem;
  margin: .6rem 0; } .text b { font-weight: 650; } .text i { color: var(--soft); font-style: normal; }
mark { background: var(--mark); color: inherit; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .4rem 1.2rem;
  font-size: .9rem; }
.beside h4 { margin: .4rem 0 0; color: var(--soft); font-weight: 600; }
.answers td { white-space: normal; text-align: left; } .answers thead th { text-align: left; }
.answers tbody th { white-space: normal; min-width: 11rem; } .answers td:nth-of-type(2n+1) { white-space: nowrap; }
.answers td:first-of-type { font-weight: 650; }
details { margin: .4rem 0; } summary { cursor: pointer; }
"""
