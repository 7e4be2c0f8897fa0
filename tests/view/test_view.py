import contextlib
import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import spelling
from tokmat_jax import progress
from tokmat_jax.data.tokenizer import train_bpe
from tokmat_jax.generation.samples import Moment
from tokmat_jax.view import terminal
from tokmat_jax.view.replay import increments

TOKENIZER = train_bpe(["one two three\n"] * 9, 290)


def moment(text, tail=()):
    slots = 1 + len(tail)
    return Moment(text, [1], 1, list(tail), [2.0] * slots, [0.5] * slots, [0.9 * (1 - j / slots) for j in range(slots)])


def test_committed_text_then_the_tail_between_bars():
    tail = [*TOKENIZER.encode("\n"), TOKENIZER.end_of_text]
    text = terminal.tail_text("one", moment(" two", tail), TOKENIZER)
    assert text.plain == "one two│⏎│⏹│"
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert (styles["one"], styles[" two"]) == ("bold", "underline")
    # The second and third of three slots, α .6 and .3: the nearer to its commit, the nearer to the accent.
    assert styles["⏎"] == "rgb(51,141,147)"
    assert styles["⏹"] == "rgb(90,135,138)"


def test_without_a_tail_there_are_no_bars():
    assert terminal.tail_text("one", moment(" two"), TOKENIZER).plain == "one two"


@given(st.text())
def test_nothing_a_model_writes_can_command_the_terminal(text):
    shown = terminal.visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert len(shown) == len(text)


def test_text_of_any_script_is_shown_as_it_is():
    text = "«\u00a0oui\u202f!» \u3000 می\u200cخواهم 👩\u200d🔬\tx\n"
    assert terminal.visible(text) == text


def test_streaming_waits_for_the_other_half_of_a_character(capsys):
    moments = [moment("caf"), moment("caf\N{REPLACEMENT CHARACTER}"), moment("café"), moment("café!")]
    assert terminal.stream_text("A ", moments) == moments
    assert capsys.readouterr().out == "A café!\n"


@pytest.mark.parametrize("tokenizer", spelling.KINDS.values(), ids=spelling.KINDS)
@given(data=st.data())
def test_streamed_shown_and_replayed_are_one_text(tokenizer, data):
    prompt = data.draw(st.one_of(st.sampled_from(["", "the", "The cat ", "é😀"]), st.text(max_size=4)))
    before = [*tokenizer.prefix, *tokenizer.encode(prompt)]
    new = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12))
    text = tokenizer.split(before, new)[1]
    moments = [Moment(tokenizer.split(before, new[:count])[1], new[:count], 1, [], [2.0], [0.5], [0.9])
               for count in range(1, len(new) + 1)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        terminal.stream_text(prompt, moments)
    assert out.getvalue() == terminal.visible(prompt + text) + "\n"
    assert terminal.tail_text(prompt, moments[-1], tokenizer).plain == terminal.visible(prompt + text)
    assert "".join(increments(before, new, tokenizer)) == text


def test_outside_a_terminal_every_step_is_a_line(capsys):
    moments = [moment(" b"), moment(" b c")]
    assert terminal.show_tails("A", [("", moments)], TOKENIZER) == [moments]
    assert capsys.readouterr().out == "A b\nA b c\n"


def test_outside_a_terminal_two_runs_take_turns_until_the_longer_one_ends(capsys):
    one, two = [moment(" b"), moment(" b c")], [moment(" d")]
    assert terminal.show_tails("A", [("s 1", one), ("s 2", two)], TOKENIZER) == [one, two]
    assert capsys.readouterr().out == "s 1: A b\ns 2: A d\ns 1: A b c\n"


def in_a_terminal(monkeypatch, runs):
    """What is on the screen of a terminal 100 wide when all is done."""
    console = Console(force_terminal=True, width=100, file=io.StringIO(), record=True)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    terminal.show_tails("A", runs, TOKENIZER)
    return console.export_text()


def test_in_a_terminal_two_runs_stand_beside_each_other_with_their_gauges(monkeypatch):
    tail = TOKENIZER.encode(" two three")
    shown = in_a_terminal(monkeypatch, [("s 1", [moment(" b", tail)]), ("s 2", [moment(" d", tail), moment(" dd")])])
    last = shown[shown.rindex("s 1"):].splitlines()
    assert last[0].split() == ["s", "1", "s", "2"]
    assert last[1].startswith("A b│")
    assert "A dd" in last[1]
    for line, name in zip(last[-3:], ("maturity", "entropy", "movement"), strict=True):
        assert line.split().count(name) == 2
    assert "front 0.90, 0.30–0.90" in last[-3]
    assert "2.00 nats" in last[-2]


@pytest.mark.parametrize(("values", "bars"), [([0.9, 0.45, 0.0], "█▅▁"), ([1.0], "▄"), ([2.0, 2.0], "▄▄")])
def test_a_bar_per_slot(values, bars):
    assert terminal.sparkline(values) == bars


def test_several_tokens_at_once_are_marked_and_counted():
    ids = TOKENIZER.encode("one two")
    assert len(ids) > 1
    several = Moment("two one two", [*TOKENIZER.encode("two "), *ids], len(ids), [], [2.0], [0.5], [0.9])
    text = terminal.tail_text("A", several, TOKENIZER)
    assert [text.plain[span.start : span.end] for span in text.spans if str(span.style) == "underline"] == ["one two"]
    assert f"{len(ids)} at once" in terminal.gauges(several).plain

@pytest.mark.parametrize("total", [None, 4])
def test_progress_outside_a_terminal_ends_with_a_line(capsys, total):
    with progress.bar("working", total) as one:
        one.update(1)
        one.update(4, "a note")
    err = capsys.readouterr().err
    assert ("working 4/4  a note" in err) == (total is not None)
