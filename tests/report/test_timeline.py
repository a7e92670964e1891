"""The numbers and columns of the page, worked by hand, and the page as a file that stands alone."""

import json
import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest

from rto_megatron.report.rows import read_run
from rto_megatron.report.timeline import (
    COLOURS,
    CRITIC_TRAINS,
    Panel,
    busy,
    columns,
    headline,
    page,
    seconds,
    shown,
    styles_of,
    tiles,
)
from rto_megatron.schedule.trace import Row
from rto_megatron.schedule.work import KINDS
from tests.report.traces import row, two_ranks


@pytest.fixture
def panel(tmp_path):
    two_ranks(tmp_path)
    return Panel.of("measured", read_run(tmp_path)[0])


def data_of(text):
    """What the page draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_summary_is_worked_by_hand(panel):
    # Of 10 s rank 0 idles 4 and rank 1 10 - 2 - 1 - 1 = 6, that is 10 of 20. Two kinds run from 2 to 4.
    # Training ends at 8 in step 0 and at 10 in step 1.
    assert panel.summary.makespan == 10
    assert panel.summary.idle == {0: 4, 1: 6}
    assert panel.summary.idle_frac == 0.5
    assert panel.summary.overlap == pytest.approx(0.2)
    assert panel.step_seconds == 2
    assert headline(panel) == (
        "measured: 2 ranks, 4 items in 10 seconds, 2 seconds per step, 50.0% idle, 20.0% with two kinds of work at once"
    )


def test_seconds_of_a_kind_are_a_mean_over_ranks(panel):
    assert panel.seconds(("decode", "")) == 3.0
    assert panel.seconds(("optimizer", "policy")) == 1.0
    assert panel.share(3.0) == 0.3
    assert {kind: spent for kind, spent in busy(panel, 1).items() if spent} == {"train": 2.0, "optimizer": 2.0}


def test_the_ranks_of_one_group_are_lines_of_their_own():
    rows = [Row(**row(rank=rank, start=0.0, end=rank + 1.0)) for rank in (0, 1)]
    found = Panel.of("measured", rows)
    assert (found.line, list(found.rows)) == ("rank", [0, 1])
    assert found.summary.idle == {0: 1.0, 1: 0.0}


def test_a_trace_without_ranks_shows_groups():
    found = Panel.of("simulated", [Row(**row(rank=-1, group=group)) for group in (1, 0)])
    assert (found.line, list(found.rows)) == ("group", [0, 1])


def test_one_step_has_no_rate():
    found = Panel.of("measured", [Row(**row())])
    assert found.step_seconds is None
    assert tiles([found])[1]["numbers"] == ["-"]


def test_columns_count_ticks_from_the_end_of_the_item_before(panel):
    found = columns(panel, styles_of([panel]))
    assert found["tick"] == 1e-6
    assert found["columns"] == {
        "gap": [0, 2_000_000, 3_000_000, 1_000_000],
        "length": [6_000_000, 2_000_000, 1_000_000, 1_000_000],
        "style": [0, 1, 2, 2],
        "step": [0, 0, 0, 1],
        "lane": [0, -1, -1, -1],
        "number": [0, 0, 0, 0],
        "tokens": [40, 0, 0, 0],
        "bytes": [0, 0, 0, 5],
    }
    assert [(line["id"], line["items"], line["idle"]) for line in found["lines"]] == [(0, 1, 0.4), (1, 3, 0.6)]
    assert found["ends"] == [(8.0, 0), (10.0, 1)]


def test_time_zero_is_the_first_row_that_is_shown():
    found = columns(Panel.of("measured", [Row(**row(start=100.0, end=120.0))]), [("decode", "")])
    assert (found["columns"]["gap"], found["ends"]) == ([0], [(20.0, 0)])


def test_items_of_no_length_alone_make_a_page():
    assert "measured" in page("run", [Panel.of("measured", [Row(**row(end=0.0))])])


def test_the_simulated_trace_is_compared_with_the_measured(panel):
    simulated = Panel.of("simulated", [Row(**row(end=8.0))])
    assert tiles([panel, simulated])[0] == {
        "name": "makespan",
        "meaning": "from the first start to the last end",
        "numbers": ["10 s", "8 s"],
        "ratio": "1.25",
    }


def test_a_hundred_thousand_rows_take_a_few_megabytes():
    rows = [
        Row(**row(rank=i % 8, step=i // 10_000, number=i, start=i * 0.0123, end=i * 0.0123 + 0.0987654, tokens=i))
        for i in range(100_000)
    ]
    text = page("run", [Panel.of("measured", rows)])
    assert len(text) < 4_500_000
    assert len(data_of(text)["panels"][0]["columns"]["gap"]) == 100_000


def test_the_page_draws_what_the_columns_say(panel):
    found = data_of(page("run", [panel]))
    assert found["panels"][0] == json.loads(json.dumps(columns(panel, styles_of([panel]))))


def test_texts_of_the_run_are_escaped():
    evil = "</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    text = page(evil, [Panel.of("measured", [Row(**row(role=evil))])], notes=[evil])
    assert "<img" not in text and text.count("</script>") == 2
    assert "{{ 7 * 7 }}" in text, "texts are values, never templates"
    assert data_of(text)["styles"][0]["name"] == f"decode {evil}"


def test_the_page_loads_nothing(panel):
    text = page("run", [panel])
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|\ssrc=|<link", text)


def test_every_tag_is_closed(panel):
    class Nesting(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "input"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    opened = []
    Nesting().feed(page("run", [panel, panel], notes=["a note"]))
    assert opened == []


def test_the_table_has_a_line_a_rank(panel):
    text = page("run", [panel])
    assert re.search(r'<th scope="row">0</th><td>6</td><td>0</td><td>0</td><td>4</td><td>40.0%</td>', text)
    assert re.search(r'<th scope="row">1</th><td>0</td><td>2</td><td>2</td><td>6</td><td>60.0%</td>', text)


def test_every_kind_has_a_colour_of_its_own_and_text_that_can_be_read_on_it():
    assert set(COLOURS) == set(KINDS) and len(set(COLOURS.values())) == len(KINDS)
    assert (shown(("decode", ""))["ink"], shown(("proximal", ""))["ink"]) == ("#fff", "#000")


def lab(linear):
    """Linear RGB in CIE Lab, where a distance of 2.3 can just be seen."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]], id="without-red"),
        pytest.param([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]], id="without-green"),
        pytest.param([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]], id="without-blue"),
    ],
)
def test_colour_blind_readers_can_tell_the_kinds_apart(seen):
    # Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as somebody without one sort of cones sees it.
    def channels(colour):
        return (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255) ** 2.2

    looks = {name: lab(seen @ channels(colour)) for name, colour in (COLOURS | {"critic": CRITIC_TRAINS}).items()}
    nearest = min(combinations(looks, 2), key=lambda pair: np.linalg.norm(looks[pair[0]] - looks[pair[1]]))
    assert np.linalg.norm(looks[nearest[0]] - looks[nearest[1]]) > 14, f"{nearest} look alike; change one of the two"


def test_training_the_critic_looks_unlike_training_the_policy():
    policy, critic = shown(("train", "policy")), shown(("train", "critic"))
    assert policy["colour"] != critic["colour"] and (policy["hatched"], critic["hatched"]) == (False, True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0, "0 s"), (1234.5, "1,234 s"), (5.356, "5.36 s"), (0.0589, "58.9 ms"), (2.5e-6, "2.5 µs")],
)
def test_seconds_are_written_in_the_unit_that_fits(value, text):
    assert seconds(value) == text
