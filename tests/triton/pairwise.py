"""Few combinations that contain every pair of values of any two parameters (greedy, without randomness)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(parameters: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    names = list(parameters)
    rows = [dict(zip(names, values, strict=True)) for values in product(*parameters.values())]

    def pairs(row: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, row[a], b, row[b]) for a, b in combinations(names, 2)}

    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen
