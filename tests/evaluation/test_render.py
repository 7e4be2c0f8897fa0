"""The two forms of a report, and its plots: what a model wrote stays text."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from tokmat_jax.evaluation.frontier import Point
from tokmat_jax.evaluation.numbers import interval, number
from tokmat_jax.evaluation.render import (
    Bullets,
    Folded,
    Heading,
    Paragraph,
    Plot,
    Quote,
    Table,
    to_html,
    to_markdown,
)

EVIL = "</div><script>alert(1)</script> & 'a' \"b\" `c` | d"


class Parsed(HTMLParser):
    """Tags and text of a page; every tag must be closed."""

    VOID = ("meta", "link")

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], "", []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("block", [
    Heading(EVIL), Paragraph(EVIL), Paragraph(EVIL, is_warning=True), Table([EVIL, "x"], [[EVIL, EVIL]]),
    Bullets([EVIL]), Folded(EVIL, [Quote([(EVIL, kind) for kind in ("prompt", "new", "tail", "mark")])]),
])
def test_nothing_that_a_model_wrote_becomes_a_tag(block):
    page = Parsed(to_html(EVIL, [block], {}))
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 2  # the title of the page, and the block


def test_what_would_turn_lines_or_cannot_be_written_is_replaced():
    blocks = [Heading("a\u202eb\x1b[2J\udcff\0"), Quote([("\u2066\ud800", "new")])]
    for page in (to_html("t", blocks, {}), to_markdown(blocks)):
        assert "a\N{REPLACEMENT CHARACTER}b" in page
        assert not set("\u202e\x1b\udcff\0\u2066\ud800") & set(page)
        page.encode("utf-8")


def test_a_page_holds_its_plots_and_names_no_other_place():
    page = to_html("t", [Plot("one"), Paragraph("text")], {"one": "<svg><text>inside</text></svg>"})
    assert "<svg><text>inside</text></svg>" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "src=" not in page


def test_markdown_keeps_its_tables_and_quotes_whole():
    text = to_markdown([Table(["", "a|b"], [["row", "1 | 2"]]), Quote([("a ``b`` c\nd", "new"), ("e", "mark")])])
    table, quote = text.split("\n\n")
    assert table.splitlines() == ["|  | a\\|b |", "| --- | --- |", "| row | 1 \\| 2 |"]
    assert quote == "> ``` a ``b`` c d[e] ```\n"


def test_the_first_line_of_a_warning_is_the_warning():
    assert to_markdown([Paragraph("MISMATCH", is_warning=True), Heading("t", 1)]).splitlines()[0] == "**MISMATCH**"


@pytest.mark.parametrize(("value", "how", "shown"), [
    (0.12345, {}, "0.123"), (-0.5, {"signed": True}, "−0.500"), (0.5, {"signed": True}, "+0.500"),
    (3.14159, {}, "3.14"), (31.4159, {}, "31.4"), (3141.59, {}, "3,142"), (0.824, {"percent": True}, "82 %"),
    (float("nan"), {}, "–"), (float("inf"), {}, "–"), (None, {}, "–"),
])
def test_numbers_show_three_digits_or_a_dash(value, how, shown):
    assert number(value, **how) == shown


def test_intervals():
    assert interval({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 (0.250–0.750)"
    assert interval({"value": 0.0, "low": -0.25, "high": 0.75}) == "0.000 (−0.250 to 0.750)"
    assert interval({"value": 0.5, "low": float("nan"), "high": float("nan")}) == "0.500"


plots = pytest.importorskip("tokmat_jax.evaluation.plots", reason="plots need matplotlib: pip install -e '.[report]'",
                            exc_type=ImportError)


def shown(svg):
    """All text in a drawing."""
    return "".join(ET.fromstring(svg).itertext())


def test_a_frontier_shows_every_curve_the_human_and_the_same_svg_again():
    curves = {"temperature": [Point("t 0", 0.8, 3.0), Point("t 1", 0.01, 40.0)], "guidance": [Point("s", 0.5, 9.0)]}
    human = Point("human", 0.03, 33.0)
    svg = plots.frontier(curves, human, {"temperature": True})
    for name in ("temperature (baseline)", "guidance", "human", "best of maturation", "judge perplexity"):
        assert name in shown(svg)
    assert plots.frontier(curves, human, {"temperature": True}) == svg


def test_a_frontier_without_a_finite_point_is_drawn_all_the_same():
    nothing = float("nan")
    svg = plots.frontier({"guidance": [Point("s", nothing, nothing)]}, Point("human", nothing, 33.0), {})
    assert "guidance" in shown(svg)


@pytest.mark.parametrize("piece", ["$x$", "\n", "日本", "<b>", "\\", "", "\x00", "%"])
def test_any_token_can_stand_in_a_plot(piece):
    token = {"candidates": [[piece, "a"], ["b", piece]], "cosines": [[0.9, 0.1], [0.5, -0.2]]}
    assert "refinement" in shown(plots.candidates(token))
    rising, falling = {"mean": [1.0, 2.0], "std": [0.1, 0.1]}, {"mean": [1.0, 0.5], "std": [0.0, 0.1]}
    data = {"tokens": [{"token": piece, "entropy": [1.0, 2.0], "sharp_entropy": [1.0, 0.5]}], "entropy": rising,
            "sharp_entropy": falling}
    assert "mean of all tokens" in shown(plots.entropy(data, (1.0, 0.1)))
