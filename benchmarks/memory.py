"""Memory and time that the export of a model over 2 GB takes.

    python benchmarks/memory.py [LAYERS] [WIDTH]

A process builds a chain of `LAYERS` Dense layers of `WIDTH` × `WIDTH` float32 weights and exports
it, verified; another thread reads the process's resident memory a hundred times a second. The
number is the peak during the export, model included, over what was resident after the imports, in
multiples of the weights. Goal: 2.5. Twice: many layers, and one large one. Linux only. Takes
2.2 GB on the disk and some 8 GB of memory. Both go into `docs/performance.md`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pages

GOAL = 2.5
CASES = [(8, 8192), (1, 23000)]
PAGE = 4096
ONE = "--one"  # asks for a single case, in this process
HEAD = ("chain of Dense layers", "weights", "file", "export, verified", "peak ÷ weights", "parity")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def tiled(shape: tuple[int, ...], dtype: object = None) -> object:
    """Random weights; TensorFlow's own generator keeps twice their memory for itself."""
    few = np.random.default_rng(0).standard_normal(1_000_003, np.float32) / np.sqrt(shape[0])
    return np.resize(few.astype(np.float32), shape)


def measure(layers: int, width: int) -> None:
    """Exports one model in this process and prints a line: the cells of its row, by tabs."""
    import onnxruntime  # noqa: F401
    import tensorflow  # noqa: F401
    import tf_keras

    import layerswap as ls
    from layerswap.keras_graph import bridge, running, storage  # noqa: F401

    before, peak, done = resident(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    dense = [
        tf_keras.layers.Dense(width, use_bias=False, kernel_initializer=tiled)
        for _ in range(layers)
    ]
    norm = tf_keras.layers.GroupNormalization(8)
    model = tf_keras.Sequential([tf_keras.Input((width,)), *dense, norm])
    weights = 4 * model.count_params()
    with tempfile.TemporaryDirectory() as folder:
        watcher.start()
        started = time.perf_counter()
        artifact = ls.export(model, Path(folder) / "large.onnx")
        seconds = time.perf_counter() - started
    done = True
    watcher.join()
    assert artifact.parity is not None
    assert artifact.parity.ok
    cells = (
        f"{layers} × {width}²",
        f"{weights / 1e9:.2f} GB",
        f"{artifact.bytes / 1e9:.2f} GB",
        f"{seconds:.1f} s",
        f"{(peak - before) / weights:.2f}",
        f"{artifact.parity.max_relative:.1g}",
    )
    print(*cells, sep="\t")


def main(cases: Sequence[tuple[int, int]]) -> None:
    """Exports each model in a process of its own; prints the table and writes a complete one."""
    rows = {}
    for case in cases:
        command = [sys.executable, __file__, ONE, *map(str, case)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        name, *cells = done.stdout.splitlines()[-1].split("\t")
        rows[name] = cells
    text = pages.with_machine(f"{pages.table(HEAD, rows)}\nGoal: a peak of {GOAL}.\n")
    print(text)
    if cases == CASES:
        pages.replace("performance.md", "memory", text)


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE]:
        measure(int(sys.argv[2]), int(sys.argv[3]))
    else:
        numbers = [int(argument) for argument in sys.argv[1:]]
        main([(numbers[0], numbers[1])] if numbers else CASES)
