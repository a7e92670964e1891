"""The page in a real browser: what a person sees, points at, types and taps."""

import pytest

from rto_megatron.credit.page import draw
from rto_megatron.pages.render import visible
from tests.browser import chromium, needs_browser, problems
from tests.credit.evaluations import HOSTILE, evaluation, response

pytestmark = [pytest.mark.slow, needs_browser]

FIRST = "#items .item:first-child "
PIECES = ["Hello", " \U0001f600", "", "", " shalom \u05e9\u05dc\u05d5\u05dd", "\n", "end", "<|end|>"]


def told():
    """The box with the numbers of a token, as rows of it; None where it is not shown."""
    return """
        const tip = document.getElementById("tip");
        const texts = row => [...row.cells].map(cell => cell.textContent);
        return tip.hidden ? null : Object.fromEntries([...tip.querySelectorAll("tr")].map(texts));
    """


def prompts(browser):
    return browser.run("return [...document.querySelectorAll('.item h2')].map(node => node.textContent)")


def choose(browser, select, value):
    browser.run(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        select,
        value,
    )


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, tmp_path):
    """Two evaluations of three prompts, opened."""
    before = [
        response(0, PIECES, size=0.01, specials=[7]),
        response(1, size=0.03, score=-1.0),
        response(2, ["a"] * 9, size=0.0),
    ]
    after = [response(0, PIECES, size=0.02, specials=[7]), response(1, size=0.01), response(2, ["a"] * 4, size=0.1)]
    (tmp_path / "credit.html").write_text(draw("run", [evaluation(0, before), evaluation(12, after)]))
    browser.open(tmp_path / "credit.html")
    yield browser
    assert problems(browser) == []


def test_a_response_reads_as_it_was_written_on_both_sides(page):
    choose(page, "order", "file")
    texts = page.run(f"return [...document.querySelectorAll('{FIRST}.text')].map(node => node.textContent)")
    assert texts == ["".join(PIECES)] * 2
    heads = page.run(f"return [...document.querySelectorAll('{FIRST}h3')].map(node => node.textContent)")
    assert heads[0].startswith("step 0") and heads[1].startswith("step 12")
    rests = page.run(f"return document.querySelectorAll('{FIRST}.rest').length")
    assert rests == 4, "tokens that complete a character are there to point at"


def test_colour_follows_the_chosen_quantity(page):
    choose(page, "order", "file")
    look = f"""
        return [...document.querySelectorAll('{FIRST}.side:last-child .token')].map(token => [
            token.classList.contains("positive"), token.classList.contains("negative"),
            token.style.getPropertyValue("--part")]);
    """
    found = page.run(look)
    assert [token[:2] for token in found[:3]] == [[False, False], [False, True], [True, False]]
    assert float(found[2][2]) == pytest.approx(2 * float(found[1][2]), abs=2e-3)
    choose(page, "quantity", "value")
    assert all(token[0] for token in page.run(look)), "all values are positive"
    assert "what the critic expects" in page.run("return document.getElementById('meaning').textContent")
    colours = page.run(f"""
        const tokens = [...document.querySelectorAll('{FIRST}.token')].slice(0, 8);
        return tokens.map(token => getComputedStyle(token).backgroundColor);
    """)
    assert len(set(colours)) == 8, "a growing value is a growing colour"


def test_pointing_at_a_token_tells_all_its_numbers(page):
    choose(page, "order", "file")
    page.point_at(FIRST + ".side:last-child .token:nth-child(2)")
    assert page.run(told()) == {
        "token": "2 of 8",
        "DPO reward": "\u22120.02",
        "KL term": "\u22120.001",
        "token reward": "\u22120.021",
        "value": "+0.35",
        "advantage": "+0.4",
        "DPO log-ratio": "\u22120.4 nats",
        "log-ratio": "+0.1 nats",
        "log-prob": "\u22121.5 nats",
        "log-prob of reference": "\u22121.6 nats",
        "return": "+0.75",
    }
    assert page.run("return document.querySelector('#tip b').textContent") == "\u2423\U0001f600"
    page.point_at(FIRST + ".side:last-child .token:nth-child(3)")
    assert page.run("return document.querySelector('#tip b').textContent") == "part of  \U0001f600"
    page.point_at("h1")
    assert page.run(told()) is None


def test_keys_move_from_token_to_token(page):
    choose(page, "order", "file")
    page.run(f"document.querySelector('{FIRST}.token').focus()")
    assert page.run(told())["token"] == "1 of 8"
    page.press("\ue014", "\ue014")  # arrow right
    assert page.run(told())["token"] == "3 of 8"
    page.press("\ue010")  # end
    assert page.run(told())["token"] == "8 of 8"
    page.press("\ue00c")  # escape
    assert page.run(told()) is None
    tabs = page.run(f"return document.querySelectorAll('{FIRST}.text [tabindex=\"0\"]').length")
    assert tabs == 2, "a response is one stop of the Tab key"


def test_a_tap_holds_the_box_until_the_next_one_elsewhere(page):
    choose(page, "order", "file")
    page.tap(FIRST + ".token:nth-child(5)")
    assert page.run(told())["token"] == "5 of 8"
    page.tap("h1")
    assert page.run(told()) is None


def test_the_curve_points_at_its_token(page):
    choose(page, "order", "file")
    page.point_at(FIRST + ".curve")  # its middle: between the fourth and the fifth of eight
    assert page.run(told())["token"] in ("4 of 8", "5 of 8")
    values = page.run(f"return document.querySelector('{FIRST}polyline.value').getAttribute('points')")
    heights = [float(point.split(",")[1]) for point in values.split()]
    assert len(heights) == 8 and heights == sorted(heights, reverse=True), "values grow; a page counts downwards"


def test_prompts_are_sorted_and_found(page):
    assert prompts(page) == ["prompt 2", "prompt 0", "prompt 1"], "the largest credit of a token now: 0.3, 0.14, 0.02"
    for order, wanted in (("scoreChange", "prompt 1"), ("length", "prompt 0"), ("lengthChange", "prompt 0")):
        choose(page, "order", order)
        assert prompts(page)[0] == wanted, order
    page.click("#reversed")
    assert prompts(page)[0] == "prompt 2", "it has become shorter by 5"
    page.run("const s = document.getElementById('search'); s.value = 'SHALOM'; s.dispatchEvent(new Event('input'))")
    assert prompts(page) == ["prompt 0"]
    assert page.run("return document.getElementById('count').textContent") == "1 of 3 prompts"


def test_numbers_stand_under_tokens(page):
    choose(page, "order", "file")
    page.click("#numbers")
    shown = page.run(f"""
        return getComputedStyle(document.querySelector('{FIRST}.token:nth-child(2)'), '::after').content;
    """)
    assert shown == '"\u22120.01"'


def test_one_side_can_be_shown_alone(page):
    choose(page, "which", "1")
    assert page.run("return [...document.querySelectorAll('h3')].every(node => node.textContent.startsWith('step 12'))")


def test_hostile_texts_do_nothing(browser, tmp_path):
    responses = [response(i, [text, *text], prompt=text) for i, text in enumerate(HOSTILE)]
    (tmp_path / "credit.html").write_text(draw("run", [evaluation(0, responses, name=HOSTILE[0])], notes=HOSTILE))
    browser.open(tmp_path / "credit.html")
    choose(browser, "order", "file")
    assert browser.run("return document.title") == "run - token credit"
    assert browser.run("return [document.scripts.length, document.images.length]") == [2, 0]
    read = browser.run("return [...document.querySelectorAll('.prompt')].map(node => node.textContent)")
    assert read == [visible(text) for text in HOSTILE]
    assert problems(browser) == []


def test_a_large_page_draws_what_is_in_view_and_more_on_the_way(browser, tmp_path):
    responses = [response(i, ["word "] * 100) for i in range(200)]
    (tmp_path / "credit.html").write_text(draw("run", [evaluation(0, responses)]))
    browser.open(tmp_path / "credit.html")
    drawn = "return document.querySelectorAll('.item').length"
    first = browser.run(drawn)
    assert 0 < first < 60
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.run("return new Promise(done => setTimeout(done, 300))")
    assert browser.run(drawn) > first


def test_a_phone_needs_no_sideways_scrolling_and_dark_is_dark(tmp_path):
    later = [response(i, ["word "] * 300, truncated=True) for i in range(3)]
    (tmp_path / "credit.html").write_text(draw("run", [evaluation(0), evaluation(12, later)]))
    with chromium(dark=True, width=500, height=800) as browser:
        browser.open(tmp_path / "credit.html")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert "tokens 300 (+297), truncated" in browser.run(f"return document.querySelector('{FIRST}').textContent")
        browser.run("scrollTo(0, document.body.scrollHeight)")
        assert browser.run("return document.querySelector('.bar').getBoundingClientRect().bottom < 0"), "in the way"
        assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
