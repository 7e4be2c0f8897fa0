import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.data.tokenizer import train_bpe
from tokmat_jax.generator import Moment
from tokmat_jax.view import progress, terminal

TOKENIZER = train_bpe(["one two three\n"] * 9, 290)


def moment(text, tail=()):
    return Moment(text, [1], list(tail), [2.0] * (1 + len(tail)), [0.5] * (1 + len(tail)))


def test_committed_text_then_the_tail_between_bars():
    tail = [*TOKENIZER.encode("\n"), TOKENIZER.end_of_text]
    text = terminal.tail_text("one", moment(" two", tail), TOKENIZER)
    assert text.plain == "one two│⏎│⏹│"
    assert [(span.start, str(span.style)) for span in text.spans] == [(3, "default"), (7, "grey50")]


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
    last = terminal.stream_text("A ", moments)
    assert capsys.readouterr().out == "A café!\n"
    assert last == moments[-1]


def test_outside_a_terminal_every_step_is_a_line(capsys):
    terminal.show_tail("A", [moment(" b"), moment(" b c")], TOKENIZER)
    assert capsys.readouterr().out == "A b\nA b c\n"


@pytest.mark.parametrize("total", [None, 4])
def test_progress_outside_a_terminal_ends_with_a_line(capsys, total):
    with progress.bar("working", total) as one:
        one.update(1)
        one.update(4, "a note")
    err = capsys.readouterr().err
    assert ("working 4/4  a note" in err) == (total is not None)
