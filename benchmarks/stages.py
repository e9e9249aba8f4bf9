"""The stages of `layerswap convert` on ResNet50, as ratios to loading it with plain tf_keras.

    python benchmarks/stages.py [RUNS]

ResNet50 with random weights (time depends on the graph and the sizes, not on the values) is saved
once as `.keras`; then, `RUNS` times in this one process, plain `tf_keras.models.load_model` (the
baseline) and the stages load, plan, swap, export (with its reference, unverified) and verify run
in turn. Every stage's median and minimum, and their ratios to the baseline's.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from machine import describe

BASELINE = "tf_keras load_model"
STAGES = ("load", "plan", "swap", "export", "verify")


class Stopwatch:
    """Seconds of each named stage, once per run."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block."""
        started = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)


def measure(runs: int, folder: Path) -> dict[str, list[float]]:
    """Times the baseline and every stage `runs` times."""
    import tf_keras

    import layerswap as ls

    source, target = folder / "resnet50.keras", folder / "resnet50.onnx"
    tf_keras.applications.ResNet50(weights=None).save(source)
    watch = Stopwatch()
    for _ in range(runs):
        with watch(BASELINE):
            tf_keras.models.load_model(source)
        with watch("load"):
            model = ls.load(source)
        with watch("plan"):
            ls.plan(model)
        with watch("swap"):
            converted = ls.swap(model)
        with watch("export"):
            ls.export(converted, target, overwrite=True, verify=False)
        with watch("verify"):
            ls.verify(target)
        tf_keras.backend.clear_session()
    return watch.seconds


def main(runs: int) -> None:
    """Prints the table and the machine's state."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(runs, Path(folder))
    totals = [sum(values) for values in zip(*(seconds[name] for name in STAGES), strict=True)]
    rows = {**seconds, "all stages": totals}
    base_median, base_least = statistics.median(rows[BASELINE]), min(rows[BASELINE])
    print(f"{'':<20} {'median':>9} {'ratio':>6} {'minimum':>9} {'ratio':>6}   ({runs} runs)")
    for name, values in rows.items():
        median, least = statistics.median(values), min(values)
        print(
            f"{name:<20} {median:>7.2f} s {median / base_median:>6.2f} "
            f"{least:>7.2f} s {least / base_least:>6.2f}"
        )
    print(f"\n{describe()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
