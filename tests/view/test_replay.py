import base64
import dataclasses
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokmat_jax.data.tokenizer import train_bpe
from tokmat_jax.generation.trajectory import Trajectory
from tokmat_jax.view.replay import Run, increments, replay
from tokmat_jax.view.terminal import visible

TOKENIZER = train_bpe(["one two three\n"] * 9, 290)
WORDS = TOKENIZER.encode("one two three\n one abc xyz")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u202e&amp;\x1b\"'"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made(num_steps=12, num_slots=4, num_candidates=3, committed=None, text=None, prompt="one", seed=0):
    """A trajectory of random words; its front says `text` where that is given."""
    rng = np.random.default_rng(seed)
    shape = (num_steps, num_slots, max(1, num_candidates))
    candidates = rng.permuted(np.broadcast_to(sorted(set(WORDS)), (*shape[:2], len(set(WORDS)))), axis=-1)
    candidates = np.resize(candidates, shape) if num_candidates > len(set(WORDS)) else candidates[..., :shape[2]]
    candidates = candidates.copy()
    if text is not None:
        candidates[:, 0, 0] = text
    cosines = -np.sort(-rng.uniform(-0.1, 0.9, shape), axis=-1)
    return Trajectory(
        np.array(TOKENIZER.encode(prompt) or [TOKENIZER.end_of_text]), 0.9 * (1 - np.arange(num_slots) / num_slots),
        np.ones(num_steps, int) if committed is None else np.array(committed), candidates[..., 0],
        3.9 + 0.01 * rng.random(shape[:2]), rng.random(shape[:2]), candidates[..., :num_candidates],
        cosines[..., :num_candidates], np.zeros((*shape[:2], 0)))


def page_of(*trajectories, titles=("guidance 1", "guidance 2"), settings=None):
    runs = [Run(title, one, settings or {}) for title, one in zip(titles, trajectories, strict=False)]
    return replay("a replay", runs, TOKENIZER)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@given(st.text(min_size=1).filter(TOKENIZER.encode))
def test_what_the_tokens_add_is_the_text(text):
    ids = TOKENIZER.encode(text)
    assert "".join(increments([], ids, TOKENIZER)) == TOKENIZER.decode(ids) == text


def test_a_character_comes_with_the_token_that_completes_it():
    ids = TOKENIZER.encode("x😀é")
    assert increments([], ids, TOKENIZER) == ["x", "", "", "", "😀", "", "é"]
    assert increments(ids[:2], ids[2:], TOKENIZER) == ["", "", "😀", "", "é"]
    assert increments([], ids[:3], TOKENIZER) == ["x", "", "\N{REPLACEMENT CHARACTER}"]
    broken = [ids[1], *TOKENIZER.encode("x")]
    assert increments([], broken, TOKENIZER) == ["", "\N{REPLACEMENT CHARACTER}x"]


def test_end_of_text_adds_nothing():
    assert increments([], [*TOKENIZER.encode("x"), TOKENIZER.end_of_text], TOKENIZER) == ["x", ""]


@pytest.mark.parametrize("count", [0, 3])
def test_one_run_or_two(count):
    with pytest.raises(ValueError, match=f"one run or two, not {count}"):
        replay("", [Run("", made(), {})] * count, TOKENIZER)


def test_the_arrays_arrive_as_they_were():
    one = made(committed=[1, 2, 1, 1, 3, 1, 1, 1, 1, 1, 1, 1])
    data = data_of(page_of(one))
    run = data["runs"][0]
    pieces = np.array(data["pieces"])
    assert len(set(data["pieces"])) == len(pieces)
    for name in ("tokens", "candidates"):
        wanted = [TOKENIZER.piece(token) for token in getattr(one, name).ravel().tolist()]
        assert pieces[run[name]].tolist() == wanted
    np.testing.assert_allclose(np.array(run["entropy"]) / data["entropyScale"], one.entropy.ravel(), atol=6e-5)
    for name in ("maturity", "movement", "cosines"):
        np.testing.assert_allclose(np.array(run[name]) / data["scale"], getattr(one, name).ravel(), atol=6e-4)
    assert run["committed"] == one.committed.tolist()
    assert "".join(run["text"]) == TOKENIZER.decode(one.text.tolist())


def test_what_is_not_finite_is_left_out():
    one = made()
    one.entropy[1, 2] = np.nan
    one.movement[0, 0] = np.inf
    run = data_of(page_of(one))["runs"][0]
    assert [i for i, value in enumerate(run["entropy"]) if value is None] == [6]
    assert [i for i, value in enumerate(run["movement"]) if value is None] == [0]


def hostile_page():
    text = TOKENIZER.encode(HOSTILE)
    run = Run(HOSTILE, made(len(text), text=text, prompt=HOSTILE), {HOSTILE: HOSTILE})
    return replay(HOSTILE, [run], TOKENIZER)


def test_no_text_breaks_out_of_its_place():
    page = hostile_page()
    assert page.count("<script") == page.count("</script") == 2
    assert "<img" not in page
    assert not re.search("[\u202e\x1b]", page)
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert data_of(page)["runs"][0]["title"] == visible(HOSTILE)


def test_nothing_but_this_script_and_this_style_may_run():
    page = hostile_page()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    for directive, found in (("script-src", re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL)[1]),
                             ("style-src", re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1])):
        digest = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_a_name_that_is_no_unicode_can_be_written():
    run = Run("\udcff", made(), {"\ud800": "\udfff"})
    replay("runs/\udcff: one", [run], TOKENIZER).encode("utf-8")


def test_names_of_places_in_a_title_are_only_text():
    assert "<title>{{data}} {{script}}</title>" in replay("{{data}} {{script}}", [Run("", made(), {})], TOKENIZER)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page's text; whatever it complains about or asks a network for fails the test."""
    contexts, complaints = [], []

    def open_page(text, **kwargs):
        contexts.append(browser.new_context(**kwargs))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: request.url.startswith("file:") or complaints.append(request.url))
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(text, encoding="utf-8")
        page.goto(path.as_uri())
        if kwargs.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def label(token):
    """How a token is written in a list."""
    return re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), TOKENIZER.piece(token)).replace("\n", "⏎")


def shown_text(page, run=0):
    return page.evaluate("""run => [...document.querySelectorAll('.run')[run].querySelectorAll(
        '.committed > span:not([hidden])')].map(span => span.textContent).join('')""", run)


def listed(page, selector="ol .word"):
    return page.locator(selector).all_text_contents()


def count(page):
    return page.locator("#count").text_content()


def scrub(page, step):
    page.locator("#scrub").fill(str(step))


def test_play_goes_to_the_end_and_stops(opened):
    one = made(5)
    page = opened(page_of(one))
    assert (count(page), shown_text(page)) == ("step 1 / 5", TOKENIZER.decode(one.text[:1].tolist()))
    page.select_option("#speed", "20")
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => window.seen.push([
        document.getElementById('count').textContent, document.getElementById('status').getAttribute('aria-live')]))
        .observe(document.getElementById('count'), {childList: true}); }""")
    page.click("#play")
    page.wait_for_selector("html:not(.playing)")
    assert page.evaluate("window.seen.map(([text]) => text)") == [f"step {step} / 5" for step in (2, 3, 4, 5)]
    assert page.evaluate("window.seen[0][1]") == "off"
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.get_attribute("#play", "aria-label") == "Play"
    assert shown_text(page) == TOKENIZER.decode(one.text.tolist())
    page.select_option("#speed", "1")
    page.click("#play")
    assert count(page) == "step 1 / 5"
    assert page.get_attribute("#play", "aria-label") == "Pause"
    page.click("#play")
    assert page.get_attribute("#play", "aria-label") == "Play"


def test_scrub_buttons_and_keys_reach_the_same_steps(opened):
    one = made()
    page = opened(page_of(one))
    scrub(page, 7)
    assert (count(page), shown_text(page)) == ("step 7 / 12", TOKENIZER.decode(one.text[:7].tolist()))
    assert listed(page, ".now") == [TOKENIZER.piece(one.text[6])]
    for act, step in ((lambda: page.click("#back"), 6), (lambda: page.click("#forth"), 7),
                      (lambda: page.keyboard.press("ArrowLeft"), 6), (lambda: page.keyboard.press("ArrowRight"), 7),
                      (lambda: page.keyboard.press("End"), 12), (lambda: page.keyboard.press("ArrowRight"), 12),
                      (lambda: page.keyboard.press("Home"), 1), (lambda: page.keyboard.press("ArrowLeft"), 1)):
        act()
        assert count(page) == f"step {step} / 12"
        assert page.locator("#scrub").input_value() == str(step)
        assert shown_text(page) == TOKENIZER.decode(one.text[:step].tolist())
    page.keyboard.press(" ")
    assert page.locator("html.playing").count() == 1
    page.keyboard.press(" ")
    assert page.locator("html.playing").count() == 0
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert count(page) == "step 1 / 12"


def test_a_slot_shows_its_candidates_and_its_measures(opened):
    one = made()
    page = opened(page_of(one))
    scrub(page, 6)
    page.click("[data-slot='3']")
    assert page.locator("[aria-pressed=true]").get_attribute("data-slot") == "3"
    assert listed(page) == [label(token) for token in one.candidates[5, 3]]
    assert listed(page, ".cosine") == [f"{cosine:.3f}".replace("-", "−") for cosine in one.cosines[5, 3]]
    assert listed(page, ".readings .chosen") == [f"slot 3 {value[5, 3]:.3f}" for value in (one.entropy, one.movement)]
    assert listed(page, ".readings .front") == [f"front {value[5, 0]:.3f}" for value in (one.entropy, one.movement)]
    assert page.locator(".plot svg path.chosen").first.get_attribute("d").count(" ") == 12 + 1
    for key, slot in (("ArrowUp", 2), ("[", 1), ("[", 0), ("[", 0), ("]", 1), ("ArrowDown", 2)):
        page.keyboard.press(key)
        assert listed(page) == [label(token) for token in one.candidates[5, slot]]
    # With the focus on a slot the space bar plays; it does not choose the slot again.
    page.focus("[data-slot='3']")
    page.keyboard.press(" ")
    assert page.locator("html.playing").count() == 1


def test_the_tail_stands_behind_the_text_and_fades(opened):
    one = made()
    page = opened(page_of(one))
    scrub(page, 4)
    shown = page.evaluate("""() => [...document.querySelectorAll('.slot:not([hidden])')].map(chip =>
        [chip.textContent, getComputedStyle(chip).backgroundColor, chip.classList.contains('settled')])""")
    tail = one.tokens[3, 1:].tolist()
    assert [text for text, _, _ in shown] == [TOKENIZER.piece(token).removeprefix(" ").replace("\n", "⏎") or "·"
                                              for token in tail]
    assert len({tint for _, tint, _ in shown}) == 3
    assert [settled for _, _, settled in shown] == [token == one.text[4 + j] for j, token in enumerate(tail)]


@pytest.mark.parametrize("committed", [None, [1, 1, 3, 1, 1, 2, 1, 1, 1, 1, 1, 1]])
def test_a_committed_token_shows_its_life(opened, committed):
    one = made(committed=committed)
    page = opened(page_of(one))
    page.keyboard.press("End")
    for token in (0, 4, 7):
        page.locator(f"[data-token='{token}']").dispatch_event("click")
        steps, slots = one.of_token(token)
        rows = page.locator("tbody tr").all()
        assert [row.locator("td").all_text_contents()[:2] for row in rows] == [
            [str(step + 1), str(slot or "front")] for step, slot in zip(steps, slots, strict=True)]
        assert [row.locator(".word").all_text_contents() for row in rows] == [
            [label(candidate) for candidate in one.candidates[step, slot]]
            for step, slot in zip(steps, slots, strict=True)]
        assert f"committed at step {steps[-1] + 1} as {label(one.text[token])}" in page.locator(".about").text_content()
        assert set(listed(page, "tbody .fate")) <= {label(one.text[token])}
        assert page.locator("[aria-current]").get_attribute("data-step") == str(steps[-1])
        assert page.locator(".committed > .chosen").get_attribute("data-token") == str(token)
    page.locator("tbody tr").first.click()
    assert count(page) == f"step {one.of_token(7)[0][0] + 1} / 12"
    page.keyboard.press(".")
    assert "token 9," in page.locator(".about").text_content()


def test_all_that_a_step_commits_is_marked(opened):
    one = made(committed=[1, 1, 3, 1, 1, 2, 1, 1, 1, 1, 1, 1])
    page = opened(page_of(one))
    scrub(page, 3)
    assert page.evaluate("[...document.querySelectorAll('.now')].map(span => span.dataset.token)") == ["2", "3", "4"]
    assert page.locator(".slot:not([hidden])").count() == 1
    scrub(page, 4)
    assert page.evaluate("[...document.querySelectorAll('.now')].map(span => span.dataset.token)") == ["5"]


def test_the_shorter_of_two_runs_stays_at_its_end(opened):
    short, long = made(3, 2, seed=1), made(8, 4, seed=2)
    page = opened(page_of(short, long), viewport={"width": 1280, "height": 800})
    assert listed(page, "h2")[:2] == ["guidance 1", "guidance 2"]
    page.keyboard.press("End")
    assert count(page) == "step 8 / 8"
    assert shown_text(page, 0) == TOKENIZER.decode(short.text.tolist())
    assert shown_text(page, 1) == TOKENIZER.decode(long.text.tolist())
    for _ in range(4):
        page.keyboard.press("]")
    assert listed(page, ".run:nth-child(1) ol .word") == [label(token) for token in short.candidates[2, 1]]
    assert listed(page, ".run:nth-child(2) ol .word") == [label(token) for token in long.candidates[7, 3]]
    first, second = (page.locator(".run").nth(index).bounding_box() for index in (0, 1))
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] < second["x"]


def test_a_phone_scrolls_down_but_not_sideways(opened):
    page = opened(page_of(made(8, 16, 6), made(8, 16, 6), titles=("x" * 90, "y")),
                  viewport={"width": 360, "height": 740})
    page.keyboard.press("End")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    first, second = (page.locator(".run").nth(index).bounding_box() for index in (0, 1))
    assert first["y"] + first["height"] < second["y"]
    rows = {round(page.locator(f"#{name}").bounding_box()["y"]) for name in ("play", "help-button")}
    assert len(rows) == 1


def test_dark_and_still_where_the_reader_wants_it(opened):
    look = """() => [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelectorAll('.ink')[1]).transitionDuration]"""
    light = opened(page_of(made()), color_scheme="light").evaluate(look)
    dark = opened(page_of(made()), color_scheme="dark", reduced_motion="reduce").evaluate(look)
    assert light == ["rgb(253, 253, 251)", "0.9s"]
    assert dark == ["rgb(23, 24, 26)", "0s"]


@pytest.mark.parametrize("shape", [(1, 1, 0), (1, 4, 1), (6, 1, 3), (6, 4, 0)])
def test_the_smallest_runs(opened, shape):
    one = made(*shape, prompt="")
    page = opened(page_of(one))
    page.keyboard.press("End")
    assert count(page) == f"step {shape[0]} / {shape[0]}"
    assert shown_text(page) == TOKENIZER.decode(one.text.tolist())
    assert page.locator(".slot:not([hidden])").count() == shape[1] - 1
    slot = int(np.ceil((shape[1] - 1) / 2))
    wanted = one.candidates[-1, slot] if shape[2] else one.tokens[-1, slot : slot + 1]
    assert listed(page) == [label(token) for token in wanted]
    assert listed(page, ".cosine") == ([f"{c:.3f}".replace("-", "−") for c in one.cosines[-1, slot]] or ["–"])
    page.click("#play")
    page.keyboard.press("]")


def test_hostile_text_is_shown_and_nothing_more(opened):
    page = opened(hostile_page())
    page.keyboard.press("End")
    assert page.title() == visible(HOSTILE)
    assert shown_text(page) == page.locator(".prompt").text_content() == visible(HOSTILE)
    assert listed(page, ".settings dd") == [visible(HOSTILE)]
    assert page.locator("img").count() == 0


def test_without_scripts_the_text_is_there(opened):
    one = made()
    page = opened(page_of(one), java_script_enabled=False)
    assert page.locator("noscript p").text_content() == TOKENIZER.decode([*one.prompt, *one.text])
    assert page.locator("#controls").is_hidden()


def test_a_long_run_stays_small(opened):
    text = page_of(made(512, 16, 8))
    assert len(text.encode()) < 1_000_000
    page = opened(text)
    page.keyboard.press("End")
    # Two elements a token and what one step shows, but none per step and slot.
    assert page.locator("*").count() < 2 * 512 + 16 * 30 + 300


def test_what_a_step_checked_is_shown_with_what_was_wrong(opened):
    one = made(4, committed=[1, 2, 3, 1], text=[1, 2, 3, 4])
    drafts = np.array([[-1, -1], [one.tokens[1, 0], 5], one.tokens[2, :2], [6, 7]])
    page = opened(page_of(dataclasses.replace(one, drafts=drafts)))
    assert page.locator(".drafts").text_content() == "nothing to check"
    scrub(page, 2)
    assert listed(page, ".drafts .fate") == [label(one.tokens[1, 0])]
    assert listed(page, ".drafts .rejected") == [label(5)]
    scrub(page, 3)
    assert listed(page, ".drafts .fate") == [label(token) for token in one.tokens[2, :2]]
    assert page.locator(".drafts .rejected").count() == 0
    scrub(page, 4)
    assert page.locator(".drafts .fate").count() == 0
    # Without drafts there is no such line.
    assert opened(page_of(made(3))).locator(".drafts").is_hidden()
