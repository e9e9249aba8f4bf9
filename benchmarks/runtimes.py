"""Which models each runtime runs as Keras does.

    python benchmarks/runtimes.py

Every model of `tests/zoo` that has an ONNX form and a reference, and some of
`tf_keras.applications` as `tests/applications.py` makes them, swapped and exported with the default
options, then verified in every runtime that is installed, at the default tolerances. onnx's own
evaluator runs the zoo alone: it takes minutes for a convolutional network.
The table goes into `docs/parity.md`. How busy the machine is doesn't matter.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pages

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the models are
APPLICATIONS = (
    "MobileNetV2",
    "MobileNetV3Small",
    "ResNet50V2",
    "ResNetRS50",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "DenseNet121",
    "InceptionV3",
    "Xception",
    "NASNetMobile",
    "RegNetX002",
)
KINDS = ("zoo", "applications")
SLOW = "reference"
Verdicts = dict[tuple[str, str], str]  # by kind and name of the model


def models() -> Iterator[tuple[str, str, Any]]:
    """Kind, name and the swapped model."""
    import tf_keras

    import applications
    import layerswap as ls
    import zoo

    for name in (*zoo.BUILDERS, *zoo.IN_PLACE):
        tf_keras.backend.clear_session()
        model = zoo.build(name)
        zoo.sample(model)
        yield "zoo", name, ls.swap(model, inplace=name in zoo.IN_PLACE)
    for name in APPLICATIONS:
        tf_keras.backend.clear_session()
        yield "applications", name, ls.swap(applications.build(name))


def exported(path: Path) -> Iterator[tuple[str, str]]:
    """Kind and name of each model that can be judged, while it lies at the path."""
    import layerswap as ls
    from layerswap.errors import ExportError

    for kind, name, converted in models():
        try:
            artifact = ls.export(converted, path, verify=False, overwrite=True)
        except ExportError as error:
            print(f"{name}: no ONNX form: {_line(error)}")
            continue
        if artifact.reference is None:
            print(f"{name}: no reference")
        else:
            yield kind, name


def installed() -> list[str]:
    """The runtimes of ONNX files that are there."""
    from layerswap.errors import MissingExtraError
    from layerswap.runtimes import FILE_RUNTIMES
    from layerswap.verifying import open_runtime

    found = []
    for name in FILE_RUNTIMES:
        try:
            found.append(open_runtime("m.onnx", name).name)
        except MissingExtraError as error:
            print(_line(error))
    return found


def judge(path: Path, runtime: str) -> str:
    """What comes of it: `runs`, `differs` or `fails`."""
    import layerswap as ls
    from layerswap.errors import ExportError, LoadError

    try:
        return "runs" if ls.verify(path, runtime=runtime).ok else "differs"
    except (ExportError, LoadError) as error:
        print(_line(error))
        return "fails"


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:150]


def report(found: Mapping[str, Verdicts]) -> str:
    """The table of what runs, and a line on what doesn't, in Markdown."""
    rows, rest = {}, []
    for runtime, verdicts in found.items():
        rows[runtime] = []
        for kind in KINDS:
            own = [verdict for (other, _), verdict in verdicts.items() if other == kind]
            rows[runtime].append(f"{own.count('runs')} of {len(own)}" if own else "not run")
        for bad in ("fails", "differs"):
            names = [name for (_, name), verdict in verdicts.items() if verdict == bad]
            if names:
                rest.append(f"- {runtime} {bad} on {', '.join(names)}.\n")
    table = pages.table(("runtime", *KINDS), rows)
    return f"{table}\n{''.join(rest)}\nThe names are those of functions in `tests/zoo`.\n"


def main() -> None:
    """Prints a line per model and runtime, then the table, and writes that."""
    found: dict[str, Verdicts] = {name: {} for name in installed()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.onnx")
        for kind, name in exported(path):
            for runtime, verdicts in found.items():
                if (kind, runtime) != ("applications", SLOW):
                    verdicts[kind, name] = judge(path, runtime)
                    print(f"{name}: {runtime} {verdicts[kind, name]}", flush=True)
    text = pages.with_machine(report(found))
    print(text)
    pages.replace("parity.md", "runtimes", text)


if __name__ == "__main__":
    main()
