"""What a converted model still knows, before any training on: the tables of `docs/accuracy.md`.

    python benchmarks/accuracy.py [NETWORK ...]

Each network of `networks.py` is trained with each of `REPORTED_SEEDS` and converted with each
number of groups in each way:

- reset, copy: `weights="reset"` and `"copy"`
- matched: the default, from what BN learned alone
- calibrated: with 256 of the inputs it was trained on, without labels
- distilled: calibrated, then 200 steps of distillation on the same 256 inputs

and scored on held-out data: accuracy, R² for the regression. A line of JSON for each is appended
to `build/accuracy.jsonl`; what stands there isn't run again, so an interrupted run goes on where it
stopped. When all networks were run, the page is written; several processes may share the work,
each with some of the networks.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pages
from networks import NETWORKS, REPORTED_SEEDS, score, trained

import layerswap as ls

BUILD = Path(__file__).parents[1] / "build"
RECORDS = BUILD / "accuracy.jsonl"
MODELS = BUILD / "accuracy-models"
PAGE = "accuracy.md"
SAMPLES = 256
STEPS = 200
GROUPS = ("auto", 32, 16, 8, -1)
METHODS = ("reset", "copy", "matched", "calibrated", "distilled")
GOALS = {  # points lost against BN: goal and stretch
    ("matched", "auto"): (4, 1),
    ("calibrated", "auto"): (2, 0.5),
    ("distilled", "auto"): (1, 0.2),
    ("matched", 32): (10, 5),
    ("calibrated", 32): (4, 2),
    ("distilled", 32): (2, 1),
}
UNET_GOALS = (0.02, 0.005)

Record = Mapping[str, Any]


def convert(model: Any, method: str, groups: int | str, samples: Any) -> Any:
    """The converted model."""
    size = {"groups": groups, "on_indivisible": "nearest", "allow_degenerate": True}
    if method in ("reset", "copy"):
        return ls.swap(model, weights=method, **size).model
    if method == "matched":
        return ls.swap(model, **size).model
    return ls.swap(
        model, samples=samples, distill=STEPS if method == "distilled" else 0, **size
    ).model


def cells() -> list[tuple[int | str, Sequence[str]]]:
    """What to measure, the numbers with goals first and what takes longest last."""
    quick, slow = METHODS[:-1], METHODS[-1:]
    first, others = GROUPS[:2], GROUPS[2:]
    return [
        *((groups, ("BN", *METHODS)) for groups in first),
        *((groups, quick) for groups in others),
        *((groups, slow) for groups in others),
    ]


def measure(
    name: str, seed: int, groups: int | str, methods: Sequence[str], known: Iterable[Record]
) -> Iterable[Record]:
    """The records of a network that aren't known yet."""
    done = {(r["network"], r["seed"], r["method"], r["groups"]) for r in known}
    todo = [
        cell
        for method in methods
        if (name, seed, *(cell := (method, 0 if method == "BN" else groups))) not in done
    ]
    if not todo:
        return
    model, data = trained(name, seed, MODELS)
    samples = data.x_train[:SAMPLES]
    for method, size in todo:
        started = time.perf_counter()
        converted = model if method == "BN" else convert(model, method, size, samples)
        seconds = time.perf_counter() - started
        value = score(name, converted, data)
        yield {
            "network": name,
            "seed": seed,
            "method": method,
            "groups": size,
            "score": value,
            "seconds": seconds,
        }


def read() -> list[Record]:
    """What earlier runs found."""
    if not RECORDS.exists():
        return []
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def values(records: Sequence[Record], name: str, method: str, groups: int | str) -> list[float]:
    """Scores by seed; empty where one isn't there."""
    found = {
        r["seed"]: r["score"]
        for r in records
        if (r["network"], r["method"], r["groups"]) == (name, method, groups)
    }
    return [found[seed] for seed in REPORTED_SEEDS] if len(found) == len(REPORTED_SEEDS) else []


def cell(scores: Sequence[float]) -> str:
    """Mean and standard deviation, over seeds."""
    if not scores:
        return "not run"
    return f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"


def lost(records: Sequence[Record], name: str, method: str, groups: int | str) -> float:
    """How much lower the mean score is than BN's."""
    bn = statistics.mean(values(records, name, "BN", 0))
    return bn - statistics.mean(values(records, name, method, groups))


def write(records: Sequence[Record]) -> None:
    """Writes the page's tables."""
    for part, hard in (("networks", False), ("hard cases", True)):
        names = [name for name, network in NETWORKS.items() if network.hard == hard]
        pages.replace(PAGE, part, "\n".join(_tables(records, name) for name in names))
    pages.replace(PAGE, "goals", _goals(records))
    pages.replace(PAGE, "seconds", pages.with_machine(_seconds(records)))


def _tables(records: Sequence[Record], name: str) -> str:
    bn = cell(values(records, name, "BN", 0))
    kind = "R²" if NETWORKS[name].regression else "accuracy"
    rows = {
        str(groups): [cell(values(records, name, method, groups)) for method in METHODS]
        for groups in GROUPS
    }
    table = pages.table(("groups", *METHODS), rows)
    return f"**{name}**, {kind}; BN {bn}\n\n{table}"


def _goals(records: Sequence[Record]) -> str:
    classifiers = [n for n, net in NETWORKS.items() if not net.hard and not net.regression]
    rows = {}
    for (method, groups), (goal, stretch) in GOALS.items():
        losses = {name: 100 * lost(records, name, method, groups) for name in classifiers}
        worst = max(losses, key=lambda name: losses[name])
        others = statistics.mean(loss for name, loss in losses.items() if name != worst)
        verdict = _verdict(losses[worst], goal, stretch)
        rows[f"{method}, groups {groups}"] = [
            f"{losses[worst]:.2f} ({worst})",
            f"{others:.2f}",
            f"{goal:g}",
            f"{stretch:g}",
            verdict,
        ]
    loss = lost(records, "unet", "distilled", "auto")
    rows["unet, R², distilled, groups auto"] = [
        f"{loss:.4f}",
        "",
        *(f"{goal:g}" for goal in UNET_GOALS),
        _verdict(loss, *UNET_GOALS),
    ]
    return pages.table(("points lost", "worst", "mean of others", "goal", "stretch", ""), rows)


def _verdict(loss: float, goal: float, stretch: float) -> str:
    return "stretch met" if loss <= stretch else "goal met" if loss <= goal else "missed"


def _seconds(records: Sequence[Record]) -> str:
    rows = {}
    for name in NETWORKS:
        own = [r for r in records if r["network"] == name and r["groups"] == "auto"]
        rows[name] = [
            f"{statistics.median(r['seconds'] for r in own if r['method'] == method):.1f}"
            for method in METHODS
        ]
    return pages.table(("seconds", *METHODS), rows)


def main(names: Sequence[str]) -> None:
    """Runs what is missing and writes the page."""
    BUILD.mkdir(exist_ok=True)
    order = itertools.product(cells(), REPORTED_SEEDS, names or NETWORKS)
    for (groups, methods), seed, name in order:
        for record in measure(name, seed, groups, methods, read()):
            line = json.dumps(record)
            print(line, flush=True)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
    records = read()
    needed = [("BN", 0), *((method, groups) for groups in GROUPS[:2] for method in METHODS)]
    missing = [n for n in NETWORKS if not all(values(records, n, *cell) for cell in needed)]
    if missing:
        print(f"the page is written when all networks were run; missing: {', '.join(missing)}")
        return
    write(records)


if __name__ == "__main__":
    main(sys.argv[1:])
