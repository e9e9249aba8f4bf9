"""What calibration costs, in forward passes.

    python benchmarks/calibration.py [RUNS]

The baseline is one pass of both models, BN and GN, over all samples with `predict` (compiled, in
batches of 32), in this one process, in turn with the calibration. Goal: 3 passes, stretch: 2. The
seconds of the swap alone are taken off. Random weights, statistics of a seeded batch.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import numpy as np
from machine import describe
from models import build

MODELS = ("ResNet50", "MobileNetV2", "UNet")
SAMPLES = 64
GOAL, STRETCH = 3.0, 2.0


def measure(name: str, runs: int) -> tuple[float, float]:
    """Medians: seconds of a pass of both models, and of a calibration."""
    import layerswap as ls

    model = build(name)
    shape = model.inputs[0].shape[1:]
    x = np.random.default_rng(0).normal(size=(SAMPLES, *shape)).astype(np.float32)
    converted = ls.swap(model, self_check=False)
    passes, calibrations = [], []
    for run in range(runs + 1):
        passes.append(_seconds(lambda: [m.predict(x, verbose=0) for m in (model, converted.model)]))
        swap = _seconds(lambda: ls.swap(model, self_check=False))
        both = _seconds(lambda: ls.swap(model, samples=x, self_check=False))
        calibrations.append(both - swap)
        if not run:  # the first run compiles and allocates
            passes.clear()
            calibrations.clear()
    return statistics.median(passes), statistics.median(calibrations)


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(runs: int) -> None:
    """Prints the table and the machine's state."""
    print(f"{'model':<14} {'pass':>8} {'calibration':>12} {'ratio':>6}   ({runs} runs)")
    for name in MODELS:
        one, cost = measure(name, runs)
        ratio = cost / one
        verdict = "stretch met" if ratio <= STRETCH else "goal met" if ratio <= GOAL else "missed"
        print(f"{name:<14} {one:>6.1f} s {cost:>10.1f} s {ratio:>6.2f}   {verdict}", flush=True)
    print(f"\n{describe()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
