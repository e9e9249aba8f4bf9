"""What two sequences share, in order."""

from __future__ import annotations

from collections.abc import Sequence

# Two sequences that have next to nothing in common would take so many steps squared.
_MOST_STEPS = 1_000

# Shared pieces, linked from the last to the first: those before it, its places, its length.
_Runs = tuple["_Runs", int, int, int] | None


def common(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Places of equal elements, increasing on both sides: as many as there can be.

    Finds the shortest way to turn one sequence into the other, as E. W. Myers' "An O(ND) Difference
    Algorithm and Its Variations" (1986) does. Of sequences that have too little in common for that
    the pairs end where it gives up.
    """
    # By diagonal, the place in the first less that in the second: how far the steps so far lead.
    ends: dict[int, tuple[int, _Runs]] = {1: (0, None)}
    for steps in range(min(len(first) + len(second), _MOST_STEPS) + 1):
        reached: dict[int, tuple[int, _Runs]] = {}
        for diagonal in range(-steps, steps + 1, 2):
            ways = []
            if (above := ends.get(diagonal + 1)) is not None:
                ways.append(above)
            if (left := ends.get(diagonal - 1)) is not None:
                ways.append((left[0] + 1, left[1]))
            inside = [way for way in ways if _is_inside(way[0], diagonal, first, second)]
            if not inside:
                continue
            start, runs = max(inside, key=lambda way: way[0])
            place = start
            while (
                place < len(first)
                and place - diagonal < len(second)
                and first[place] == second[place - diagonal]
            ):
                place += 1
            if place > start:
                runs = (runs, start, start - diagonal, place - start)
            reached[diagonal] = (place, runs)
            if place == len(first) and place - diagonal == len(second):
                return _pairs(runs)
        ends = reached
    farthest = max(ends, key=lambda diagonal: 2 * ends[diagonal][0] - diagonal)
    return _pairs(ends[farthest][1])


def _is_inside(place: int, diagonal: int, first: Sequence[str], second: Sequence[str]) -> bool:
    return place <= len(first) and place - diagonal <= len(second)


def _pairs(runs: _Runs) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    while runs is not None:
        before, one, other, length = runs
        result += [(one + n, other + n) for n in reversed(range(length))]
        runs = before
    return result[::-1]
