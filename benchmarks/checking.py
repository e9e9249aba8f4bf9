"""How long `layerswap check` takes, against an interpreter that only loads the file with onnx.

    python benchmarks/checking.py [RUNS]

Goal: a file of 100 MB within 3 times `python -c "import onnx; onnx.load(FILE)"`, every run a fresh
process. The commands run alternately, so that a busy spell of the machine hits all of them; the
files are in the file system's cache. Beside it: the same file with its weights outside, all weights
looked at, and 1,000 small files in one call, with one process and with as many as layerswap takes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from machine import describe
from onnx import helper, numpy_helper
from ratios import interleave

GOAL = 3
LAYERS, CHANNELS, SMALL = 45, 256, 1_000
LOAD = "import sys, onnx; [onnx.load(path) for path in sys.argv[1:]]"


def model(layers: int, channels: int) -> onnx.ModelProto:
    """Convolutions, each followed by a decomposed GroupNormalization of 8 groups and Relu."""
    rng = np.random.default_rng(0)
    weights = {
        "grouped": np.array([0, 8, -1]),
        "back": np.array([0, channels, 16, 16]),
        "one8": np.ones(8, np.float32),
        "zero8": np.zeros(8, np.float32),
        "one": np.ones(channels, np.float32),
        "zero": np.zeros(channels, np.float32),
    }
    nodes, x = [], "x"

    def add(op_type: str, *inputs: str, **attributes: object) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    for layer in range(layers):
        weights[f"w{layer}"] = rng.normal(size=(channels, channels, 3, 3)).astype(np.float32)
        weights[f"g{layer}"] = rng.normal(size=channels).astype(np.float32)
        x = add("Conv", x, f"w{layer}", pads=[1, 1, 1, 1])
        x = add("Reshape", x, "grouped")
        x = add("InstanceNormalization", x, "one8", "zero8", epsilon=1e-3)
        x = add("Reshape", x, "back")
        x = add("BatchNormalization", x, f"g{layer}", "zero", "zero", "one", epsilon=0.0)
        x = add("Relu", x)
    shape = ["N", channels, 16, 16]
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def commands(folder: Path) -> dict[str, dict[str, list[str]]]:
    """What is measured, the baseline of each table first; writes the files."""
    large = model(LAYERS, CHANNELS)
    inside, outside = folder / "inside.onnx", folder / "outside.onnx"
    onnx.save(large, inside)
    onnx.save(large, outside, save_as_external_data=True, location="outside.data")
    small = model(2, 8).SerializeToString()
    files = []
    for number in range(SMALL):
        files.append(folder / f"{number}.onnx")
        files[-1].write_bytes(small)
    load, check = [sys.executable, "-c", LOAD], [sys.executable, "-m", "layerswap", "check", "-q"]
    size = inside.stat().st_size / 1e6
    return {
        f"{size:.0f} MB in one file": {
            "onnx.load": [*load, str(inside)],
            "check": [*check, str(inside)],
            "check --weights": [*check, str(inside), "--weights"],
        },
        f"{size:.0f} MB, weights outside": {
            "onnx.load": [*load, str(outside)],
            "check": [*check, str(outside)],
            "check --weights": [*check, str(outside), "--weights"],
        },
        f"{SMALL} files of {len(small) / 1e3:.0f} kB": {
            "onnx.load": [*load, *map(str, files)],
            "check --jobs 1": [*check, *map(str, files), "--jobs", "1"],
            "check": [*check, *map(str, files)],
        },
    }


def run(command: Sequence[str]) -> None:
    """Runs it; whatever it prints is dropped."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def show(title: str, seconds: Mapping[str, Sequence[float]]) -> float:
    """Prints a table; gives the ratio of the medians of `check` and of the baseline."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    least = {name: min(values) for name, values in seconds.items()}
    baseline = next(iter(seconds))
    print(f"{title:<28} {'median':>9} {'ratio':>6} {'minimum':>9} {'ratio':>6}")
    for name in seconds:
        print(
            f"{name:<28} {medians[name]:>7.2f} s {medians[name] / medians[baseline]:>6.2f} "
            f"{least[name]:>7.2f} s {least[name] / least[baseline]:>6.2f}"
        )
    print()
    return medians["check"] / medians[baseline]


def main(runs: int) -> None:
    """Prints the tables, the goal and the machine's state."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for title, ways in commands(Path(folder)).items():
            calls = {name: lambda command=command: run(command) for name, command in ways.items()}
            ratios.append(show(title, interleave(calls, runs)))
    verdict = "met" if ratios[0] <= GOAL else "missed"
    print(f"goal: one file within {GOAL} times onnx.load: {verdict} ({ratios[0]:.2f})\n")
    print(describe())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
