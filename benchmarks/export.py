"""How long an export to ONNX takes, against stock `tf2onnx.convert.from_keras`.

    python benchmarks/export.py [RUNS] [MODEL ...]

The same swapped model is exported by both, in this one process and in turn. tf2onnx writes a file;
layerswap does that, asks Keras for the answers of the reference file, and runs the result in ONNX
Runtime: all three are shown, the first being what tf2onnx does. What is found for ResNet50, the
default, goes into `docs/performance.md`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pages
from models import build
from ratios import interleave, to_baseline

DEFAULT = ["ResNet50"]


def ways(model: Any, folder: Path) -> dict[str, Any]:
    """By name, what writes the model."""
    import tf2onnx

    import layerswap as ls

    def stock() -> None:
        tf2onnx.convert.from_keras(model, opset=18, output_path=str(folder / "stock.onnx"))

    def ours(last: str) -> None:
        """Exports up to the stage `last`; verified where that is empty."""

        def progress(stage: str) -> None:
            if stage == last:
                raise Enough

        with suppress(Enough):
            ls.export(
                model,
                folder / "ours.onnx",
                verify=last == "",
                overwrite=True,
                progress=progress,
            )

    return {
        "tf2onnx.convert.from_keras": stock,
        "layerswap, file written": lambda: ours("reference"),
        "layerswap, with reference": lambda: ours("none"),
        "layerswap, verified": lambda: ours(""),
    }


class Enough(Exception):
    """What was to be timed is done."""


def main(runs: int, names: list[str]) -> None:
    """Prints, per model, seconds and how many times faster than tf2onnx; writes the default's."""
    import layerswap as ls

    tables = []
    for name in names:
        converted = ls.swap(build(name))
        with tempfile.TemporaryDirectory() as folder:
            seconds = interleave(ways(converted.model, Path(folder)), runs)
        rows = {}
        for way, (median, least) in to_baseline(seconds).items():
            middle, shortest = statistics.median(seconds[way]), min(seconds[way])
            rows[way] = [
                f"{middle:.2f} s",
                f"{1 / median:.1f}",
                f"{shortest:.2f} s",
                f"{1 / least:.1f}",
            ]
        tables.append(
            pages.table((name, "median", "times faster", "minimum", "times faster"), rows)
        )
    text = pages.with_machine("\n".join(tables) + f"\n{runs} runs.\n")
    print(text)
    if names == DEFAULT:
        pages.replace("performance.md", "export", text)


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    main(numbers[0] if numbers else 3, [a for a in sys.argv[1:] if not a.isdigit()] or DEFAULT)
