"""Small models of every shape, each with non-trivial BN statistics.

`BUILDERS` are those that the swap handles; a builder takes nothing and returns a model.
`IN_PLACE` are those of which it can't make a copy, `REFUSED` those that it refuses.
`build(name)` also fills in seeded statistics and `sample(model)` gives matching inputs.
"""

from zoo import (
    axes,
    behaving,
    cells,
    compiled,
    custom,
    graphs,
    kinds,
    neighbours,
    nesting,
    refusals,
    refused_calls,
    reloaded,
    subclassed,
    uncopyable,
    wrapped,
)
from zoo.registry import (
    BUILDERS,
    IN_PLACE,
    REFUSED,
    TOLERANCES,
    bn,
    build,
    randomize,
    randomize_layer,
    sample,
)

__all__ = [
    "BUILDERS",
    "IN_PLACE",
    "REFUSED",
    "TOLERANCES",
    "axes",
    "behaving",
    "bn",
    "build",
    "cells",
    "compiled",
    "custom",
    "graphs",
    "kinds",
    "neighbours",
    "nesting",
    "randomize",
    "randomize_layer",
    "refusals",
    "refused_calls",
    "reloaded",
    "sample",
    "subclassed",
    "uncopyable",
    "wrapped",
]
