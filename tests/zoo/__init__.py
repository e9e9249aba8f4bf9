"""Small models of every shape, each with non-trivial BN statistics.

`BUILDERS` are those that the swap handles; a builder takes nothing and returns a model.
`REFUSED` are those that it refuses. `build(name)` also fills in seeded statistics and
`sample(model)` gives matching inputs.
"""

from zoo import (
    axes,
    cells,
    compiled,
    custom,
    graphs,
    kinds,
    neighbours,
    nesting,
    refusals,
    reloaded,
    subclassed,
    wrapped,
)
from zoo.registry import (
    BUILDERS,
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
    "REFUSED",
    "TOLERANCES",
    "axes",
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
    "reloaded",
    "sample",
    "subclassed",
    "wrapped",
]
