"""The constants of the planner's model of a GPU, in one table with their source.

They are modelled: estimates, or chosen so that bench/cuda_levels.py models the least time. `measured.json` beside this
file replaces those of an architecture; `python -m bench.cuda_constants` on a GPU measures and writes it.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

MEASURED = Path(__file__).with_name("measured.json")


class Constants(NamedTuple):
    """The unit of time is one output row of a tile in one stage of the pipeline: 6 clocks of an A100's tensor cores."""

    stage_cost: float = 20  # a stage besides its products: weights to shared memory, barrier; an estimate
    block_cost: float = 100  # a block's start and end; an estimate
    split_cost: float = 40  # 28 KB of partial sums stored or loaded; an estimate
    trip: float = 50  # a round trip to L2 that nothing hides; an estimate
    #: So many times as long a block takes alone on a multiprocessor as beside one that fills its pauses; chosen.
    alone: float = 1.05
    l2_reached: float = 0.625  # of L2's rate, by blocks that all start together; chosen
    #: A row of a warpgroup tile. By the rates 0.63 / 0.82 (arXiv 2402.13499); chosen like the others.
    wgmma_row: float = 0.85
    #: Bytes that L2 gives a multiprocessor in a unit if all ask: the rates are in bench/cuda_levels.py.
    l2_bytes: float = 136
    l2_shares: float = 2.2  # so many times that if others do not ask: 64 bytes a clock
    pair_bytes: float = 67  # the same of what a multiprocessor reads from another one; an estimate
    pair_trips: float = 2  # round trips that this takes after the products


#: By architecture; Hopper's rates for those that are not named.
MODELLED = {
    80: Constants(l2_bytes=280, l2_shares=1.35),
    86: Constants(l2_bytes=300, l2_shares=1.25),
    89: Constants(l2_bytes=300, l2_shares=1.25),
    90: Constants(),
    100: Constants(l2_bytes=127),
    120: Constants(l2_bytes=300, l2_shares=1.25),
}


@functools.cache
def constants(architecture: int) -> Constants:
    """Measured ones where there are, else modelled."""
    modelled = MODELLED.get(architecture, MODELLED[90])
    try:
        entry = json.loads(MEASURED.read_text()).get(str(architecture))
        if entry is None:
            return modelled
        found = {name: float(entry["constants"][name]) for name in Constants._fields if name in entry["constants"]}
        if not all(math.isfinite(value) and value > 0 for value in found.values()):
            raise ValueError(f"a constant of architecture {architecture} is not a positive number")
        return modelled._replace(**found)
    except FileNotFoundError:
        return modelled
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"parnet_kernels: modelled constants, since {MEASURED} cannot be read: {error}", stacklevel=2)
        return modelled


def write_measured(architecture: int, entry: dict[str, object]) -> Path:
    """Puts an architecture's entry ("constants", and where they come from) into the file."""
    entries = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    temporary = MEASURED.with_suffix(".new")
    temporary.write_text(json.dumps({**entries, str(architecture): entry}, indent=1, sort_keys=True) + "\n")
    temporary.replace(MEASURED)
    constants.cache_clear()
    return MEASURED
