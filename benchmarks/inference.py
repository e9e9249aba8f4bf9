"""How fast a GN model runs, in each form and runtime, as ratios to the BN model.

    python benchmarks/inference.py [RUNS] [MODEL ...]

Every model is exported with BN (folded into its convolutions) and, swapped with groups="auto", in
each form of `--groupnorm`; ResNet50 also by stock tf2onnx. One thread, one image at a time, all in
this one process and in turn. Per runtime the baseline is the BN model in that runtime; a cell holds
the ratio of the medians and of the minima. Then the SavedModels of ResNet50 in TensorFlow, the
baseline the signature of the BN model.

The tables replace those in `docs/performance.md`, when all models were run.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pages
from models import build, sample
from ratios import interleave, to_baseline

MODELS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121", "UNet")
STOCK = "ResNet50"  # by itself tf2onnx takes half a minute for it, and longer for the others
TUNED = "target onnxruntime"
FORMS = ("portable", "plain", "precise", "primitive", "native")
Run = Callable[[], object]
Cells = dict[str, dict[str, tuple[float, float]]]


def sessions(files: Mapping[str, Path], inputs: Any) -> dict[str, dict[str, Run]]:
    """For each runtime that is installed: what runs each file once."""
    runtimes = {"onnxruntime": _onnxruntime, "openvino": _openvino, "opencv": _opencv}
    found: dict[str, dict[str, Run]] = {}
    for name, opened in runtimes.items():
        for form, path in files.items():
            try:
                run = opened(path, inputs)
                run()
            except ImportError:
                print(f"{name} isn't installed")
                break
            except Exception as error:
                print(f"{name} fails on {form}: {str(error).strip().splitlines()[0][:150]}")
            else:
                found.setdefault(name, {})[form] = run
    return found


def _onnxruntime(path: Path, inputs: Any) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs}
    return lambda: session.run(None, feed)


def _openvino(path: Path, inputs: Any) -> Run:
    from layerswap.onnx_graph.openvino import OpenVino

    openvino = OpenVino()._module  # imported without its telemetry
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda: compiled([inputs])


def _opencv(path: Path, inputs: Any) -> Run:
    import cv2

    cv2.setNumThreads(1)
    net = cv2.dnn.readNetFromONNX(str(path))

    def run() -> object:
        net.setInput(inputs)
        return net.forward()

    return run


def exports(name: str, folder: Path) -> tuple[dict[str, Path], Any]:
    """The BN model and the GN model in each form, and an input."""
    import layerswap as ls

    model = build(name)
    files = {"BN": folder / "bn.onnx"}
    ls.export(model, files["BN"], verify=False, overwrite=True)
    converted = ls.swap(model)
    for form in FORMS:
        files[form] = folder / f"{form}.onnx"
        ls.export(converted, files[form], verify=False, overwrite=True, groupnorm=form)
    files[TUNED] = folder / "tuned.onnx"
    ls.export(converted, files[TUNED], verify=False, overwrite=True, target_runtime="onnxruntime")
    if name == STOCK:
        import tf2onnx

        files["stock tf2onnx"] = folder / "stock.onnx"
        tf2onnx.convert.from_keras(
            converted.model, opset=18, output_path=str(files["stock tf2onnx"])
        )
    return files, sample(model)


def saved_models(folder: Path, runs: int) -> dict[str, tuple[float, float]]:
    """The signatures of ResNet50 in TensorFlow: BN, GN in affine form, stock GN."""
    import tensorflow as tf

    import layerswap as ls

    model = build("ResNet50")
    converted = ls.swap(model)
    ls.export(model, folder / "bn", verify=False)
    ls.export(converted, folder / "gn", verify=False)
    stock = tf.function(lambda x: converted.model(x, training=False))
    stock = stock.get_concrete_function(tf.TensorSpec([None, *model.input_shape[1:]]))
    tf.saved_model.save(converted.model, str(folder / "stock"), signatures=stock)
    inputs = tf.constant(sample(model))
    ways: dict[str, Run] = {}
    for name, label in (("bn", "BN"), ("gn", "GN, affine form"), ("stock", "GN, stock layer")):
        loaded = tf.saved_model.load(str(folder / name))
        ways[label] = _signature(loaded, inputs)
    return to_baseline(interleave(ways, runs))


def _signature(loaded: Any, inputs: Any) -> Run:
    signature = loaded.signatures["serving_default"]
    return lambda: (loaded, signature(inputs))


def table(title: str, cells: Cells) -> str:
    """A table in Markdown: rows of `cells`, columns of its first row and all others."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    rows = {
        name: [f"{row[c][0]:.2f} / {row[c][1]:.2f}" if c in row else "–" for c in columns]
        for name, row in cells.items()
    }
    return pages.table((title, *columns), rows)


def main(runs: int, names: tuple[str, ...]) -> None:
    """Measures, prints the tables and, if complete, writes them into the documentation."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    found: dict[str, Cells] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            files, inputs = exports(name, Path(folder))
            for runtime, ways in sessions(files, inputs).items():
                ratios = to_baseline(interleave(ways, runs))
                found.setdefault(runtime, {})[name] = ratios
                print(table(runtime, {name: ratios}), flush=True)
    parts = [table(f"{runtime}, ratio to BN", cells) for runtime, cells in found.items()]
    with tempfile.TemporaryDirectory() as folder:
        parts.append(table("TensorFlow", {"ResNet50": saved_models(Path(folder), runs)}))
    text = "\n".join(parts) + f"\n{runs} runs. Each cell: median / minimum.\n"
    text = pages.with_machine(text)
    print(text)
    if set(names) == set(MODELS):
        pages.replace("performance.md", "inference", text)


if __name__ == "__main__":
    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    chosen = tuple(a for a in sys.argv[1:] if not a.isdigit())
    main(numbers[0] if numbers else 20, chosen or MODELS)
