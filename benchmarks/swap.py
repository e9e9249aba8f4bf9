"""What `ls.swap` costs, and how that grows with the number of layers.

    python benchmarks/swap.py [RUNS]

ResNet50 and EfficientNetB7 with random weights: swapped with and without the self-check, as
ratios to copying the model as tf_keras does it, `clone_model` and `set_weights`; in this one
process, in turn, so that a busy spell of the machine hits all. Goal: 1.2 times without the
self-check, 1.6 times with it.

Then chains of `Dense` and `BatchNormalization` of 100 to 2000 layers: seconds, seconds per layer,
and the exponent of the power law that fits them best (goal: 1, linear). Where matplotlib is
installed they are plotted in `swap-growth.svg` in the current folder.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from machine import describe

APPLICATIONS = ("ResNet50", "EfficientNetB7")
BASELINE = "clone_model, set_weights"
GOALS = {"swap(self_check=False)": 1.2, "swap": 1.6}
SIZES = (100, 200, 500, 1000, 2000)
WIDTH = 32
DEEPEST = 100_000  # tf_keras recurses over the graph when it builds or clones a model
PLOT = Path("swap-growth.svg")

Seconds = dict[str, list[float]]


def clone(model: Any) -> Any:
    """The baseline: how tf_keras copies a model."""
    import tf_keras

    copied = tf_keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    return copied


def contenders() -> dict[str, Callable[[Any], Any]]:
    """By name, what is measured."""
    import layerswap as ls

    return {
        BASELINE: clone,
        "swap(self_check=False)": lambda model: ls.swap(model, self_check=False),
        "swap": ls.swap,
    }


def measure(model: Any, runs: int) -> Seconds:
    """Times each contender `runs` times in turn; one unmeasured round first."""
    seconds: Seconds = {}
    for run in range(runs + 1):
        for name, work in contenders().items():
            gc.collect()
            started = time.perf_counter()
            work(model)
            if run:
                seconds.setdefault(name, []).append(time.perf_counter() - started)
    return seconds


def chain(size: int) -> Any:
    """A model of `size` layers, Dense and BatchNormalization in turn."""
    import tf_keras
    from tf_keras import layers

    inputs = x = layers.Input((WIDTH,))
    for _ in range(size // 2):
        x = layers.BatchNormalization()(layers.Dense(WIDTH)(x))
    return tf_keras.Model(inputs, x)


def exponent(seconds: Mapping[int, float]) -> float:
    """The p of the power law `seconds ~ layers ** p` that fits best, in logarithms."""
    xs, ys = map(math.log, seconds), map(math.log, seconds.values())
    return statistics.linear_regression(list(xs), list(ys)).slope


def plot(growth: Mapping[str, Mapping[int, float]]) -> str:
    """Draws the growth and says where, or why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib isn't installed"
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, seconds in growth.items():
        axes.plot(list(seconds), list(seconds.values()), marker="o", label=name)
    axes.set(xlabel="layers", ylabel="seconds (least)", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PLOT)
    return f"plot: {PLOT}"


def print_ratios(name: str, seconds: Seconds, runs: int) -> None:
    """The table of one model."""
    base_median, base_least = statistics.median(seconds[BASELINE]), min(seconds[BASELINE])
    print(f"{name:<26} {'median':>9} {'ratio':>6} {'minimum':>9} {'ratio':>6}   ({runs} runs)")
    for what, values in seconds.items():
        median, least = statistics.median(values), min(values)
        goal = GOALS.get(what)
        met = "met" if goal and median / base_median <= goal else "missed"
        print(
            f"  {what:<24} {median:>7.2f} s {median / base_median:>6.2f} "
            f"{least:>7.2f} s {least / base_least:>6.2f}"
            + (f"   goal {goal}: {met}" if goal else "")
        )
    print(flush=True)


def main(runs: int) -> None:
    """Prints the tables and the machine's state."""
    import tf_keras

    sys.setrecursionlimit(DEEPEST)
    for name in APPLICATIONS:
        print_ratios(name, measure(getattr(tf_keras.applications, name)(weights=None), runs), runs)
        tf_keras.backend.clear_session()

    growth: dict[str, dict[int, float]] = {}
    print(f"{'layers':>6}" + "".join(f" {name:>32}" for name in contenders()))
    for size in SIZES:
        line = f"{size:>6}"
        for name, values in measure(chain(size), runs).items():
            least = growth.setdefault(name, {})[size] = min(values)
            line += f" {least:>15.2f} s {least / size * 1e3:>6.2f} ms/layer"
        print(line, flush=True)
        tf_keras.backend.clear_session()
    print("growth" + "".join(f" {f'layers ^ {exponent(s):.2f}':>32}" for s in growth.values()))
    print(f"{plot(growth)}\n\n{describe()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
