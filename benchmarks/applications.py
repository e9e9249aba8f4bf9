"""Swaps every model of tf_keras.applications that holds BatchNormalization; writes the table.

    python benchmarks/applications.py [NAME ...]

Each model runs in a process of its own, with random weights and the statistics of a seeded batch:
plan, swap with groups="auto", the checks of `tests/applications.py`, export to ONNX. Those under 10
million parameters also go to `.keras` and back. A line of JSON per model is appended to
`build/applications.jsonl`; what stands there isn't run again, so an interrupted run goes on where
it stopped. At the end `docs/applications.md` is written from it. Nothing is downloaded.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "build" / "applications.jsonl"
TABLE = ROOT / "docs" / "applications.md"
SMALL = 10e6  # parameters
TIMEOUT = 1800  # seconds for one model
PACKAGES = ("layerswap", "tensorflow", "tf_keras", "tf2onnx", "onnx", "onnxruntime", "numpy")
PARITIES = ("keras", "onnx", "ulp")
# Run first: the smallest.
FIRST = ("MobileNet", "EfficientNetB0", "NASNetMobile", "RegNetX00", "RegNetY00", "DenseNet121")

INTRODUCTION = """\
# tf_keras.applications

All {count} models of `tf_keras.applications` that hold BatchNormalization, swapped with
`groups="auto"`: {passed} passed. Passed means: the plan refuses nothing; no BatchNormalization is
left; every other weight is equal bit by bit; the source is unchanged; the self-check holds. The
weights are random (`weights=None`), γ and β too; the statistics of BatchNormalization are those of
a seeded batch.

All were exported to ONNX and run in ONNX Runtime, those under 10 million parameters also written as
`.keras` and read back with plain tf_keras. The number is the largest difference to the swapped
model's output (logits), over the largest output. A dash: not tried. Deep networks with random
weights amplify rounding: the column "1 ulp" holds how much Keras's own output changes when each
value of the input moves by one unit in the last place, which is what no runtime can undercut.
ONNX: {exact} of {passed} within 1e-5, {close} within 1e-4, the largest {worst:.2g}; the largest
multiple of "1 ulp" is {multiple:.1f}.

`groups`: number of groups × number of layers that got it. Seconds of plan, swap and export on a
shared machine with {cores} cores say which models take long, no more.

| model | input | weights | layers | BN | groups | plan | swap | export | `.keras` | ONNX | 1 ulp |
|---|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|
"""
CLOSING = """
{versions}; Python {python}; {date}. Written by `python benchmarks/applications.py`.
"""


def run_one(name: str) -> dict[str, Any]:
    """Everything about one model, in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    import applications
    import layerswap as ls

    model = applications.build(name)
    weights = model.get_weights()
    record: dict[str, Any] = {
        "input": model.input_shape[1],
        "parameters": model.count_params(),
        "layers": len(model.layers),
        "batchnorms": len(applications.batchnorms(model)),
    }
    started = time.perf_counter()
    plan = ls.plan(model, groups="auto")
    record["plan_s"] = time.perf_counter() - started
    assert not plan.refusals, plan.refusals
    record["groups"] = Counter(str(swap.config["groups"]) for swap in plan.swaps)
    started = time.perf_counter()
    converted = ls.swap(model, groups="auto")
    record["swap_s"] = time.perf_counter() - started
    assert len(converted.plan.swaps) == record["batchnorms"]
    applications.check_swap(model, weights, converted.model)
    with tempfile.TemporaryDirectory() as folder:
        if record["parameters"] < SMALL:
            record["keras"] = applications.keras_parity(converted, Path(folder))
        started = time.perf_counter()
        artifact = ls.export(converted, Path(folder) / "model.onnx", verify=False)
        record["export_s"] = time.perf_counter() - started
        record["megabytes"] = artifact.bytes / 1e6
        record["onnx"] = applications.onnx_parity(converted.model, Path(artifact.path))
    record["ulp"] = applications.sensitivity(converted.model)
    return record


def run(name: str) -> dict[str, Any]:
    """Everything about one model, in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"took over {TIMEOUT} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def records() -> dict[str, dict[str, Any]]:
    """What was measured so far, by name; the last line on a model counts."""
    if not RECORDS.exists():
        return {}
    lines = (json.loads(line) for line in RECORDS.read_text().splitlines())
    return {line["name"]: line for line in lines}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from the records alone."""
    passed = [name for name in found if "error" not in found[name]]
    parity = [found[name]["onnx"] for name in passed]
    text = INTRODUCTION.format(
        count=len(found),
        passed=len(passed),
        cores=os.cpu_count(),
        exact=sum(value <= 1e-5 for value in parity),
        close=sum(value <= 1e-4 for value in parity),
        worst=max(parity),
        multiple=max(found[name]["onnx"] / found[name]["ulp"] for name in passed),
    )
    for name in sorted(found):
        text += _row(name, found[name])
    every = [f"{key} {value}" for key, value in _common(found, "versions").items()]
    dates = sorted({record["date"] for record in found.values()})
    return text + CLOSING.format(
        versions=", ".join(every),
        python=_common(found, "python"),
        date=" to ".join(dict.fromkeys((dates[0], dates[-1]))),
    )


def _row(name: str, record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"| {name} | failed: {record['error']} |||||||||||\n"
    groups = ", ".join(
        f"{n} × {count}" for n, count in sorted(record["groups"].items(), key=lambda g: -int(g[0]))
    )
    parity = [f"{record[kind]:.2g}" if kind in record else "–" for kind in PARITIES]
    cells = (
        name,
        f"{record['input']}²",
        f"{record['parameters'] / 1e6:.1f} M",
        record["layers"],
        record["batchnorms"],
        groups,
        f"{record['plan_s']:.1f}",
        f"{record['swap_s']:.1f}",
        f"{record['export_s']:.1f}",
        *parity,
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _common(found: Mapping[str, Mapping[str, Any]], key: str) -> Any:
    values = {json.dumps(record[key]) for record in found.values()}
    if len(values) > 1:
        raise SystemExit(f"the records differ in their {key}: delete {RECORDS} and run again")
    return json.loads(values.pop())


def main(wanted: list[str]) -> None:
    """Runs what is missing and writes the table."""
    sys.path.insert(0, str(ROOT / "tests"))
    import applications

    known = applications.names()
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise SystemExit(f"no such model with BatchNormalization: {', '.join(unknown)}")
    order = wanted or sorted(known, key=lambda name: not name.startswith(FIRST))
    RECORDS.parent.mkdir(exist_ok=True)
    for name in order:
        if "error" in records().get(name, {"error": "not run"}):
            record = {
                "name": name,
                "date": datetime.date.today().isoformat(),
                "python": platform.python_version(),
                "versions": {package: version(package) for package in PACKAGES},
                **run(name),
            }
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(name, record.get("error", "passed"), flush=True)
    found = records()
    if found.keys() >= set(known):
        TABLE.write_text(table(found))
        print(f"wrote {TABLE}")
    else:
        print(f"{len(set(known) - found.keys())} models missing: no table yet")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run_one(sys.argv[2])))
    else:
        main(sys.argv[1:])
