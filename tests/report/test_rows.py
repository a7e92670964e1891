"""Files of a run's ranks and starts -> rows of one run."""

import json
import re

import pytest

from rto_megatron.errors import DataError
from rto_megatron.report.rows import join_starts, read_run
from rto_megatron.schedule.trace import Row, read_rows
from rto_megatron.schedule.trace_folder import match_starts, split_starts
from tests.report.traces import row, two_ranks, write


def item(step, start, *, rank=0, number=0):
    return Row(**row(rank=rank, step=step, number=number, start=start, end=start + 1))


def spans(rows, rank=0):
    """(step, start) of a rank's rows."""
    return [(found.step, found.start) for found in rows if found.rank == rank]


def joined(starts):
    """The run, from rows by rank and start of that rank."""
    return join_starts(match_starts(starts))


def test_all_ranks_are_read_in_the_order_of_their_numbers(tmp_path):
    for rank in (10, 9):
        write(tmp_path, rank, [row(rank=rank)])
    rows, _ = read_run(tmp_path)
    assert [found.rank for found in rows] == [9, 10]


def test_a_torn_last_line_is_left_out_with_a_note(tmp_path):
    write(tmp_path, 0, [row()], tail=json.dumps(row(number=1))[:30])
    rows, notes = read_run(tmp_path)
    assert len(rows) == 1
    assert notes == ["rank_0.jsonl:2: a row was cut off in the middle of writing, and is left out"]


def test_a_row_that_was_written_behind_a_torn_one_is_kept(tmp_path):
    torn_then_whole = json.dumps(row(step=1))[:-5] + json.dumps(row(step=7)) + "\n"
    rows, notes = read_rows(write(tmp_path, 0, [row()], tail=torn_then_whole))
    assert [found.step for found in rows] == [0, 7]
    assert notes == ["rank_0.jsonl:2: a row was cut off in the middle of writing, and is left out"]


def test_a_rank_that_has_written_nothing_yet_is_a_note(tmp_path):
    write(tmp_path, 0, [row()])
    write(tmp_path, 2, [])
    assert read_run(tmp_path)[1] == ["rank_2.jsonl: no rows yet", "no file of rank 1"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{}", "a row of a trace needs the fields"),
        ("[1]", "a row of a trace needs the fields"),
        ("", "a row of a trace needs the fields"),
        ("\0\0", "a row of a trace needs the fields"),
        ("[" * 100_000, "a row of a trace needs the fields"),
        (json.dumps(row(step="1")), "step must be a whole number, got '1'"),
        (json.dumps(row(lane=True)), "lane must be a whole number, got True"),
        (json.dumps(row(end=float("nan"))), "end must be seconds from the start of the run, got nan"),
        (json.dumps(row(end=10**400)), "end must be seconds from the start of the run, got 1000"),
        (json.dumps(row(start=2.0)), "end must not be before start 2.0, got 1.0"),
        (json.dumps(row(kind="<b>")), "kind must be one of prefill, "),
        (json.dumps(row(role=None)), "role a text"),
        (json.dumps(row(rank=3)), "rank must be 0 as in the name of the file, got 3"),
    ],
)
def test_damage_is_an_error_that_names_file_and_line(tmp_path, damage, message):
    path = write(tmp_path, 0, [row()], tail=damage + "\n" + json.dumps(row(number=2)) + "\n")
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)):
        read_run(tmp_path)


def test_a_run_without_a_trace_is_told_which_runs_have_one(tmp_path):
    with pytest.raises(DataError, match=r"traces are written by runs with a schedule.map other than sequential"):
        read_run(tmp_path)


def test_a_run_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: there is no such run folder"):
        read_run(tmp_path / "gone")


def test_a_trace_without_any_row_is_an_error(tmp_path):
    write(tmp_path, 0, [])
    with pytest.raises(DataError, match=r"trace: needs at least one row, found none"):
        read_run(tmp_path)


def test_a_run_of_one_start_is_left_as_it_is(tmp_path):
    two_ranks(tmp_path)
    rows, notes = read_run(tmp_path)
    assert [(found.start, found.end) for found in rows] == [(0, 6), (2, 4), (7, 8), (9, 10)]
    assert notes == []


def test_a_start_begins_where_the_clock_goes_back():
    first, second = [item(0, 5), item(1, 6)], [item(2, 0), item(3, 1)]
    assert split_starts(first + second) == [first, second]


def test_a_start_begins_where_an_item_comes_again_on_a_clock_that_goes_on():
    first, second = [item(0, 0), item(1, 1)], [item(1, 9)]
    assert split_starts(first + second) == [first, second]


def test_steps_that_were_run_again_are_shown_as_they_were_run_last():
    # The second start goes on at step 1, on a clock of its own; step 2 of the first was run with weights that are gone.
    run = joined({0: [[item(0, 0), item(1, 1), item(2, 2)], [item(1, 50)]]})
    assert spans(run) == [(0, 0), (1, 1)]


def test_a_start_goes_on_for_all_ranks_where_the_last_rank_had_ended():
    run = joined({
        0: [[item(0, 0)], [item(1, 0), item(2, 4)]],
        1: [[item(0, 2, rank=1)], [item(1, 1, rank=1)]],
    })  # fmt: skip
    assert spans(run, rank=0) == [(0, 0), (1, 3), (2, 7)]
    assert spans(run, rank=1) == [(0, 2), (1, 4)]


def test_a_rank_that_was_killed_before_its_first_row_is_put_into_the_start_that_it_has():
    run = joined({
        0: [[item(0, 0), item(1, 1)], [item(1, 0)]],
        1: [[item(1, 0.5, rank=1)]],
        2: [[item(0, 0.5, rank=2)]],
    })  # fmt: skip
    assert spans(run, rank=0) == [(0, 0), (1, 1.5)]
    assert spans(run, rank=1) == [(1, 2.0)]
    assert spans(run, rank=2) == [(0, 0.5)]


def test_a_run_that_began_anew_shows_the_new_beginning_only():
    assert spans(joined({0: [[item(0, 0), item(1, 1)], [item(0, 0)]]})) == [(0, 0)]


def test_starts_are_told_in_a_note(tmp_path):
    write(tmp_path, 0, [row(), row()])
    assert read_run(tmp_path)[1] == [
        "started 2 times; what was run again is shown once, and the time between is left out"
    ]


def test_waiting_for_those_who_come_later_is_no_part_of_an_item(tmp_path):
    mine, theirs = row(kind="optimizer", start=0.0, end=5.0), row(kind="optimizer", start=4.0, end=5.0)
    write(tmp_path, 0, [mine])
    write(tmp_path, 1, [theirs | {"rank": 1, "group": 1}])
    assert [(found.start, found.end) for found in read_run(tmp_path)[0]] == [(4, 5), (4, 5)]
