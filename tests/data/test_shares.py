"""Rows shared out by their tokens: each once, as evenly as they allow, within the limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rto_megatron.config.parallel import Cut
from rto_megatron.data.shares import cut_by_length, deal, imbalance, padded_tokens

LENGTHS = st.lists(st.integers(1, 50), min_size=8, max_size=40)


def test_the_longest_row_goes_to_who_has_least():
    tokens = [100, 1, 1, 1, 50, 49, 1, 1]
    assert deal(tokens, 2) == [[0, 2, 6], [1, 3, 4, 5, 7]]
    assert imbalance(tokens, deal(tokens, 2)) == 102 / 102
    assert imbalance(tokens, [range(4), range(4, 8)]) == 103 / 102


def test_pairs_stay_together():
    assert deal([5, 5, 1, 8, 2, 2], 2, unit=2) == [[0, 1], [2, 3, 4, 5]]
    assert cut_by_length([5, 5, 1, 8, 2, 2], Cut(rows=2), unit=2) == [[4, 5, 0, 1], [2, 3]]


@given(tokens=LENGTHS, hands=st.integers(1, 8))
def test_each_rank_gets_a_row_and_none_much_more_than_the_mean(tokens, hands):
    shares = deal(tokens, hands)
    assert sorted(row for share in shares for row in share) == list(range(len(tokens)))
    assert all(share == sorted(share) and share for share in shares)
    # who gets a row had least, so at most the mean of all others
    most = sum(tokens) / hands + max(tokens) * (1 - 1 / hands)
    assert max(sum(tokens[row] for row in share) for share in shares) <= most + 1e-9


def test_too_few_rows_for_the_ranks():
    with pytest.raises(ValueError, match="3 rows cannot be shared out over 4"):
        deal([1, 1, 1], 4)


def test_a_microbatch_holds_as_many_rows_of_like_length_as_its_limits_allow():
    tokens = [5, 2, 9, 3, 4, 30]
    assert cut_by_length(tokens, Cut(rows=2)) == [[1, 3], [4, 0], [2, 5]]
    assert cut_by_length(tokens, Cut(tokens=15)) == [[1, 3, 4], [0], [2], [5]]  # 3 x 4, then 4 x 5 would be 20
    assert cut_by_length(tokens, Cut(tokens=15, packed=True)) == [[1, 3, 4, 0], [2], [5]]  # 2 + 3 + 4 + 5
    assert cut_by_length(tokens, Cut(tokens=15, rows=2, packed=True)) == [[1, 3], [4, 0], [2], [5]]
    assert padded_tokens(tokens, Cut(tokens=15)) == 12 + 5 + 9 + 30
    assert padded_tokens(tokens, Cut(tokens=15, packed=True)) == 53


@given(tokens=LENGTHS, limit=st.integers(1, 100), rows=st.none() | st.integers(1, 5), packed=st.booleans())
def test_every_row_is_in_one_microbatch_and_only_a_row_alone_is_over_the_limit(tokens, limit, rows, packed):
    cut = Cut(tokens=limit, rows=rows, packed=packed)
    micros = cut_by_length(tokens, cut)
    assert sorted(row for micro in micros for row in micro) == list(range(len(tokens)))
    for micro in micros:
        held = [tokens[row] for row in micro]
        size = sum(held) if packed else len(held) * max(held)
        assert len(micro) == 1 or (size <= limit and (rows is None or len(micro) <= rows))
        assert size <= cut.most_tokens(max(held))
