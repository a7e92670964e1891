"""Rows shared out by their tokens: over data-parallel ranks, and over microbatches. Functions of lengths alone."""

from collections.abc import Sequence

from rto_megatron.config.parallel import Cut


def deal(tokens: Sequence[int], hands: int, *, unit: int = 1) -> list[list[int]]:
    """Rows for each of some data-parallel ranks, so that all get about as many tokens; each gets at least one item.

    Longest first, each to the rank that has least so far (R. L. Graham, "Bounds on multiprocessing timing anomalies",
    1969: at most 4/3 of the best). The work of a row is its tokens: attention's share, which grows with the square,
    is one percent per 120 tokens at a hidden size of 1024.

    Args:
        tokens: of each row.
        hands: ranks.
        unit: neighbouring rows that stay together (2 for pairs).

    Returns:
        Row numbers of each rank, ascending. They need not be equally many.

    Raises:
        ValueError: there are fewer items than ranks.
    """
    items = [sum(tokens[at : at + unit]) for at in range(0, len(tokens), unit)]
    if len(items) < hands:
        raise ValueError(f"{len(items)} rows cannot be shared out over {hands} data-parallel ranks")
    held: list[list[int]] = [[] for _ in range(hands)]
    sums = [(0, 0, hand) for hand in range(hands)]
    for item in sorted(range(len(items)), key=lambda item: (-items[item], item)):
        total, count, hand = min(sums)
        held[hand].append(item)
        sums[hand] = total + items[item], count + 1, hand
    return [[unit * item + row for item in sorted(mine) for row in range(unit)] for mine in held]


def imbalance(tokens: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    """Tokens of the fullest share over their mean: 1 where all are equal. Ranks wait for the fullest."""
    sums = [sum(tokens[row] for row in share) for share in shares]
    return max(sums) * len(sums) / sum(sums)


def cut_by_length(tokens: Sequence[int], cut: Cut, *, unit: int = 1) -> list[list[int]]:
    """Row numbers of each microbatch: rows of like length, as many as `cut` allows and at least one item.

    Sorted by length, so that little of a microbatch is padding.

    Args:
        tokens: of each row.
        unit: neighbouring rows that stay together (2 for pairs); together they are one row to `cut.rows`.
    """
    items = [tokens[at : at + unit] for at in range(0, len(tokens), unit)]
    micros: list[list[int]] = []
    held = 0
    for item in sorted(range(len(items)), key=lambda item: (max(items[item]), item)):
        alone = sum(items[item]) if cut.packed else unit * max(items[item])
        # the longest so far, and as wide as this one are all others where they are padded
        together = (held + alone if cut.packed else (len(micros[-1]) + 1) * alone) if micros else alone
        full = bool(micros) and cut.rows is not None and len(micros[-1]) == cut.rows
        if not micros or full or (cut.tokens is not None and together > cut.tokens):
            micros.append([])
            together = alone
        micros[-1].append(item)
        held = together
    return [[unit * item + row for item in micro for row in range(unit)] for micro in micros]


def padded_tokens(tokens: Sequence[int], cut: Cut) -> int:
    """Tokens that are computed, padding included, where rows are cut so."""
    if cut.packed:
        return sum(tokens)
    return sum(len(micro) * max(tokens[row] for row in micro) for micro in cut_by_length(tokens, cut))
