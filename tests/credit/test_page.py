"""The page as a file: its data, its size, and texts that try to break out of it."""

import json
import re
from html.parser import HTMLParser

import pytest

from rto_megatron.credit import page as page_module
from rto_megatron.credit.page import draw, draw_run, quantities, tiles
from rto_megatron.credit.record import file_of, write_evaluation
from rto_megatron.pages.render import HOUSE, visible
from tests.credit.evaluations import HOSTILE, evaluation, response


def data_of(text):
    """What the page draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_same_prompt_stands_side_by_side():
    before = evaluation(0, [response(3), response(4, size=0.02)])
    after = evaluation(9, [response(4, size=0.04), response(5)])
    found = data_of(draw("run", [before, after]))
    assert [side["name"] for side in found["sides"]] == ["step 0", "step 9"]
    assert [(item["index"], [side is not None for side in item["sides"]]) for item in found["items"]] == [
        (4, [True, True]),
        (5, [False, True]),
        (3, [True, False]),
    ]
    assert found["items"][0]["sides"][1]["columns"]["dpo"] == [0, -0.04, 0.08]


def test_both_sides_have_one_scale():
    evaluations = [evaluation(0, [response(size=0.1)]), evaluation(9, [response(size=0.4)])]
    found = {quantity["key"]: quantity["scale"] for quantity in quantities(evaluations)}
    # 98 % of 0, 0, 0.1, 0.2, 0.4, 0.8 is the fifth of the six
    assert found["dpo"] == 0.4
    assert list(found) == list(page_module.QUANTITIES)


@pytest.mark.parametrize(("values", "scale"), [([0, 0, 0], 1), ([None] * 3, 1), ([0.0] * 99 + [3.0], 3)])
def test_a_scale_is_never_zero(values, scale):
    columns = {"reward": values}
    assert quantities([evaluation(0, [response(columns=columns)])])[0]["scale"] == scale


def test_tiles_are_means_over_responses():
    found = tiles([evaluation(0, [response(size=0.1), response(1, size=0.3, score=0.5, truncated=True)])])
    # DPO: 0.1 * (0 - 1 + 2) and 0.3 * 1
    assert {tile["name"]: tile["numbers"] for tile in found} == {
        "score": ["1"], "DPO reward": ["0.2"], "KL, nats": ["0.3"], "tokens": ["3"], "truncated": ["0.5"],
    }  # fmt: skip


def test_a_run_without_scores_has_no_tile_for_them():
    assert "score" not in [tile["name"] for tile in tiles([evaluation(0, [response(score=None)])])]


def test_a_run_is_drawn_from_its_files(tmp_path):
    for step in (0, 4, 8):
        write_evaluation(file_of(tmp_path, step), evaluation(step))
    assert [side["name"] for side in data_of(draw_run(tmp_path, 4))["sides"]] == ["step 0", "step 4"]
    assert [side["name"] for side in data_of(draw_run(tmp_path, 0))["sides"]] == ["step 0"]


def test_hostile_texts_stay_texts():
    responses = [response(i, prompt=text, pieces=[text, *text]) for i, text in enumerate(HOSTILE)]
    text = draw(HOSTILE[0], [evaluation(0, responses, name=HOSTILE[1])], notes=HOSTILE)
    text.encode("utf-8")
    assert "<img" not in text and text.count("</script>") == 2
    assert "\0" not in text and "\u202e" not in text
    assert "{{ 7 * 7 }}" in text, "texts are values, never templates"
    assert [item["prompt"] for item in data_of(text)["items"]] == [visible(prompt) for prompt in HOSTILE]


def test_what_hides_or_reorders_is_shown_and_letters_stay():
    assert visible("a\0b\x1b\x7f\r") == "a\u2400b\u241b\u2421\u240d"
    assert visible("\u202egnp") == "\u27e8U+202E\u27e9gnp"
    assert visible("\ud83d") == "\ufffd"
    hidden = "\u034f\u115f\u1160\u17b4\u180e\u3164\ufe00\uffa0\U0001d173\U000e0041\U000e0100"
    assert visible(hidden) == "".join(f"\u27e8U+{ord(sign):04X}\u27e9" for sign in hidden)
    for text in (
        "a\n\tb",
        "\u05e9\u05dc\u05d5\u05dd",
        "\U0001f469\u200d\U0001f467",
        "\u2764\ufe0f",
        "\u0645\u06cc\u200c\u062e",
    ):
        assert visible(text) == text


def test_a_large_run_stays_below_the_limit_and_says_so(monkeypatch):
    assert page_module.MOST_BYTES == 3_000_000
    monkeypatch.setattr(page_module, "MOST_BYTES", 300_000)
    responses = [response(i, pieces=["word "] * 25, size=1e-5 * (i + 1)) for i in range(200)]
    text = draw("run", [evaluation(0, responses), evaluation(9, responses)])
    assert len(text) < 350_000
    found = data_of(text)
    shown = [item["index"] for item in found["items"]]
    assert 20 < len(shown) < 200 and shown == sorted(shown)
    assert set(shown) >= {199, 198}, "those with most credit are kept"
    assert f"{len(shown)} of 200 prompts are shown" in text


def test_an_endless_response_is_cut_and_its_length_and_sums_are_told(monkeypatch):
    monkeypatch.setattr(page_module, "MOST_SHOWN", 2)
    side = data_of(draw("run", [evaluation(0, [response(specials=[0, 2])])]))["items"][0]["sides"][0]
    assert (side["length"], side["pieces"], side["specials"]) == (3, ["I", " am"], [0])
    assert len(side["columns"]["dpo"]) == 2
    assert (side["sums"]["dpo"], side["sums"]["log_ratio"]) == (0.01, 0.3), "of all three"


def test_prompts_that_were_not_stored_are_told():
    text = draw("run", [evaluation(0, num_prompts=900)])
    assert "the evaluation had 900 prompts, of which the first 1 were stored" in text


def test_no_responses_make_a_page():
    assert data_of(draw("run", [evaluation(0, [])]))["items"] == []


def test_the_page_loads_nothing_and_closes_its_tags():
    text = draw("run", [evaluation()])
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:(?!//www\.w3\.org/2000/svg)|@import|url\(|\ssrc=|<link", text)
    opened = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "input", "br"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Tags().feed(text)
    assert opened == []


def luminance(colour):
    """Relative luminance of three numbers to 255 by WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_on_the_strongest_colours():
    style = (HOUSE / "house.html").read_text()
    most = float(re.search(r"--most: ([\d.]+)", style)[1])
    parts = style.split("prefers-color-scheme: dark")
    for light_or_dark in (parts[0], parts[1].split("* {")[0]):
        page, ink = (
            [int(re.search(rf"--{name}: #(\w+)", light_or_dark)[1][i : i + 2], 16) for i in (0, 2, 4)]
            for name in ("page", "ink")
        )
        for hue in ("positive", "negative"):
            colour = [int(part) for part in re.search(rf"--{hue}: (\d+) (\d+) (\d+)", light_or_dark).groups()]
            mixed = [most * c + (1 - most) * p for c, p in zip(colour, page, strict=True)]
            bright, dark = sorted((luminance(mixed), luminance(ink)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) > 4.5
