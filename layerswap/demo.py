"""The bundled demonstration: a trained digits network, converted naively, matched and calibrated.

Everything printed is computed while it runs. The network and the digits travel in the wheel;
in a checkout or an editable install they are the repository's `fixtures/`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import layerswap as ls
from layerswap.atomic import check_target
from layerswap.errors import ExportError, LoadError, ParityError

if TYPE_CHECKING:
    from rich.console import Console

    from layerswap.records import Array, Artifact

MODEL_NAME = "digits_bn.keras"
DIGITS_NAME = "digits_test.npz"
OUTPUT_DIR = "demo-output"
ONNX_NAME = "digits_gn.onnx"

KERAS_DEFAULT_GROUPS = 32
SAMPLES = 256

FINETUNE_BATCH = 2
FINETUNE_STEPS = 300
FINETUNE_EVERY = 50
FINETUNE_RATE = 0.003  # near what the model was compiled with; at ten times this, some runs diverge
FINETUNE_SEED = 0


def run_demo(
    finetune: bool = False, output_dir: Path | None = None, console: Console | None = None
) -> None:
    """Runs the main job on the bundled network and prints what came of it.

    Args:
        finetune: train the models on for a while at batch size 2 and print their accuracies.
        output_dir: where the ONNX file goes; `demo-output` in the current folder by default.
            The demo's own earlier output there is overwritten.
        console: where to print; standard output by default.

    Raises:
        LayerswapError: an extra is missing, the bundled files are, or a stage failed.
    """
    from rich.console import Console
    from rich.markup import escape

    from layerswap.onnx_graph.runtimes import open_runtime

    # Whatever is missing or in the way is said before the work.
    open_runtime("onnxruntime")
    model_path, digits = find_file(MODEL_NAME), load_digits()
    target = _target(Path(OUTPUT_DIR) if output_dir is None else output_dir)
    console = console or Console()
    started = time.perf_counter()
    console.print(
        f"A residual network with BatchNormalization, trained on 8x8 handwritten digits "
        f"({len(digits['x_train'])} to train on, {len(digits['x'])} held out).",
        soft_wrap=True,
    )
    source = ls.load(model_path)

    samples = digits["x_train"][:SAMPLES]
    swapped = {}
    for groups in ("auto", KERAS_DEFAULT_GROUPS):
        for weights in ("reset", "copy", "match"):
            swapped[groups, weights] = ls.swap(source, groups=groups, weights=weights)
        swapped[groups, "calibrated"] = ls.swap(source, groups=groups, samples=samples)
    matched, naive = swapped["auto", "match"], swapped["auto", "reset"]
    _print_accuracies(console, source, swapped, digits)
    console.print(f"Layers swapped: {len(matched.plan.swaps)}. Nothing was trained.\n")

    artifact = ls.export(matched, target, overwrite=True)
    _print_export(console, artifact, target)
    console.print(f"That took {time.perf_counter() - started:.0f} s.\n")

    if finetune:
        models = {"BN": source, "GN, reset": naive.model, "GN, matched": matched.model}
        _print_curves(console, {k: _finetune(m, digits) for k, m in models.items()})

    console.print("Next, your own model (.keras, .h5 or a SavedModel folder):")
    commands = {
        "layerswap plan MODEL": "what would be swapped and what not, and why",
        "layerswap convert MODEL OUT.onnx": "swap, match, export, verify",
        "layerswap verify OUT.onnx": "the proof once more, without TensorFlow",
    }
    if not finetune:
        commands["layerswap demo --finetune"] = "training on at batch size 2"
    width = max(map(len, commands))
    for command, meaning in commands.items():
        console.print(f"  [bold]{escape(command.ljust(width))}[/]  {meaning}", highlight=False)


def find_file(name: str) -> Path:
    """The path of a bundled file: in the installed package, or in the repository's fixtures.

    Raises:
        LoadError: it is in neither.
    """
    package = Path(__file__).parent
    for candidate in (package / "_demo" / name, package.parent / "fixtures" / name):
        if candidate.is_file():
            return candidate
    raise LoadError(
        "the demo's bundled files are missing",
        where=name,
        hint="Install layerswap again, or run the demo in a clone of the repository.",
    )


def load_digits() -> dict[str, Array]:
    """The digits: `x`, `y` held out, `x_train`, `y_train` the others."""
    with np.load(find_file(DIGITS_NAME)) as archive:
        return dict(archive)


def _target(folder: Path) -> Path:
    """Where the ONNX file goes; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"the folder can't be made: {error.strerror}",
            where=str(folder),
            hint="Name another with --output-dir.",
        ) from error
    check_target(folder / ONNX_NAME, overwrite=True)
    return folder / ONNX_NAME


def _scores(model: Any, digits: Mapping[str, Array]) -> Array:
    scores: Array = np.asarray(model.predict(digits["x"], verbose=0))
    return scores


def _accuracy(scores: Array, digits: Mapping[str, Array]) -> float:
    return float((scores.argmax(axis=-1) == digits["y"]).mean())


def _print_accuracies(
    console: Console,
    source: Any,
    swapped: Mapping[tuple[str | int, str], ls.Converted],
    digits: Mapping[str, Array],
) -> None:
    """One row for the BN model and one for each way to swap: accuracy and drift."""
    from rich.table import Table

    from layerswap.comparison import measure_drift

    table = Table(title="Accuracy on the held-out digits, right after the swap")
    table.add_column("model")
    table.add_column("groups")
    for heading in ("accuracy", "same digit", "drift"):
        table.add_column(heading, justify="right")

    before = _scores(source, digits)
    table.add_row("BN, as trained", "", f"{_accuracy(before, digits):.1%}", "", "")
    meanings = {
        "reset": "GN, naive: γ and β reset",
        "copy": "GN, naive: γ and β copied",
        "match": "GN, matched",
        "calibrated": "GN, calibrated",
    }
    previous = None
    for (groups, weights), converted in swapped.items():
        if groups != previous:
            table.add_section()
            previous = groups
        after = _scores(converted.model, digits)
        drift = measure_drift([{"digit": before}], [{"digit": after}])
        assert drift is not None  # scores are floating point
        same = drift.argmax_agreement
        used = ", ".join(map(str, sorted({swap.groups for swap in converted.plan.swaps})))
        table.add_row(
            meanings[weights],
            f"{used} (auto)" if groups == "auto" else f"{used} (Keras)",
            f"{_accuracy(after, digits):.1%}",
            "" if same is None else f"{same:.1%}",
            f"{drift.relative_error:.1%}",
            style="bold" if (groups, weights) == ("auto", "match") else None,
        )
    console.print(table)
    console.print(
        f"calibrated: matched, then fitted to {SAMPLES} training digits without their labels;\n"
        "same digit: how often GN and BN see the same one; drift: ‖GN − BN‖ / ‖BN‖;\n"
        "(auto): layerswap's choice of groups; (Keras): GroupNormalization's default",
        soft_wrap=True,
    )


def _print_export(console: Console, artifact: Artifact, target: Path) -> None:
    """What was written, and the verification of it in ONNX Runtime, repeated from the files."""
    from rich.markup import escape

    console.print(
        f"Exported to {escape(str(target))}: {artifact.bytes / 1e3:.0f} kB, "
        f"opset {artifact.opset}, GN in standard operators.",
        soft_wrap=True,
    )
    parity = ls.verify(target)
    tolerance = parity.tolerance
    if not parity.ok:
        raise ParityError(
            f"{parity.runtime} differs from Keras by {parity.max_absolute:.1e}",
            where=str(target),
            hint="Please report this: the demo's own export should always pass.",
        )
    console.print(
        f"Verified in {parity.runtime} at batch sizes {', '.join(map(str, parity.batches))}: "
        f"largest difference from Keras {parity.max_absolute:.1e}, "
        f"relative {parity.max_relative:.1e} "
        f"(tolerance {tolerance.absolute:.0e} + {tolerance.relative:.0e} of the largest output).",
        soft_wrap=True,
    )


def _finetune(model: Any, digits: Mapping[str, Array]) -> dict[int, float]:
    """Trains `model` in place with SGD at batch size 2; accuracy by number of steps.

    Every model sees the same batches in the same order.
    """
    model.compile(optimizer="sgd", loss=model.loss)
    model.optimizer.learning_rate = FINETUNE_RATE
    order = np.random.default_rng(FINETUNE_SEED).permutation(len(digits["x_train"]))
    curve = {0: _accuracy(_scores(model, digits), digits)}
    for step in range(1, FINETUNE_STEPS + 1):
        batch = order[(step - 1) * FINETUNE_BATCH : step * FINETUNE_BATCH]
        model.train_on_batch(digits["x_train"][batch], digits["y_train"][batch])
        if step % FINETUNE_EVERY == 0:
            curve[step] = _accuracy(_scores(model, digits), digits)
    return curve


def _print_curves(console: Console, curves: Mapping[str, Mapping[int, float]]) -> None:
    from rich.table import Table

    table = Table(title="Held-out accuracy while training on")
    table.add_column("steps", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for step in next(iter(curves.values())):
        table.add_row(str(step), *(f"{curve[step]:.1%}" for curve in curves.values()))
    console.print(table)
    console.print(
        f"SGD, learning rate {FINETUNE_RATE}, batch size {FINETUNE_BATCH}, the digits it was "
        "trained on, the same batches for all. One seed on a small network: an illustration, "
        "not a benchmark.\n",
        soft_wrap=True,
    )
