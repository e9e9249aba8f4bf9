"""Training on at batch sizes 1, 2 and 4, from BN and from GN: a section of `docs/accuracy.md`.

    python benchmarks/finetuning.py [NETWORK ...]
    python benchmarks/finetuning.py --rates [NETWORK ...]

Each network, trained with each of `REPORTED_SEEDS`, is trained on from seven starts:

- BN frozen, BN trainable: the baselines. Frozen layers stay in inference mode and keep γ and β;
  trainable ones use the statistics of each small batch, and go on moving theirs with the momentum
  they were trained with, 0.9.
- reset, copy, matched, calibrated, distilled: GN with groups "auto", as in `accuracy.py`. The last
  two see 256 inputs of the data that is trained on next, without labels; BN is the teacher, for
  shifted data too.

on two sets of data:

- same: what the network was trained on
- shifted: inputs for training and for testing changed alike. Digits: half the contrast on a grey
  ground, an eighth of the width to the right, noise. Waves: red noise, a gain of 0.7, an offset.

by SGD with momentum 0.9 over the same 600 labelled inputs, once, in the same order and in the same
batches for all starts. The learning rate is proportional to the batch size. Its rate per input is
one for all starts of a network, not tuned for any one: that of the best mean end over all starts,
both sets of data, the middle batch size and `DEVELOPMENT_SEEDS`. `--rates` runs these. Where
another rate's mean is within `TIE` of the best, both are run and shown.

Held-out accuracy is measured before, after a third and after all of the inputs. A line of JSON for
each run is appended to `build/finetuning.jsonl`; what stands there isn't run again, so an
interrupted run goes on where it stopped. When all are there, those of `--rates` too, the section
is written.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pages
from accuracy import METHODS, MODELS, PAGE, SAMPLES, convert
from networks import DEVELOPMENT_SEEDS, REPORTED_SEEDS, Array, Data, score, trained

RECORDS = Path(__file__).parents[1] / "build" / "finetuning.jsonl"
# Per input of a batch, the best of the development seeds first.
RATES = {"mlp": (1e-4,), "conv1d": (3e-5,), "depthwise": (3e-5, 1e-5)}
TIE = 1e-3
CANDIDATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
BATCHES = (1, 2, 4)
MIDDLE = 2
SEEN = 600
KINDS = ("same", "shifted")
BASELINES = ("BN frozen", "BN trainable")
STARTS = (*BASELINES, *METHODS)
TOLERANCE = 0.05  # a run that ends further below the BN model as it was has failed

Record = Mapping[str, Any]
Key = tuple[str, int, str, str, float, int]  # network, seed, kind, start, rate, batch


def shifted(data: Data, seed: int) -> Data:
    """The data with other inputs: of digits if they are images or flat, else of waves."""
    rng = np.random.default_rng(seed)
    change = _shift_waves if data.x_train.ndim == 3 else _shift_digits
    return replace(data, x_train=change(data.x_train, rng), x_test=change(data.x_test, rng))


def _shift_digits(x: Array, rng: np.random.Generator) -> Array:
    side = 8 if x.ndim == 2 else x.shape[1]
    moved = np.roll(x.reshape(-1, side, side), side // 8, axis=2).reshape(x.shape)
    return (0.3 + 0.5 * moved + rng.normal(0, 0.1, x.shape)).astype(np.float32)


def _shift_waves(x: Array, rng: np.random.Generator) -> Array:
    noise = rng.normal(0, 1, x.shape)
    for step in range(1, x.shape[1]):
        noise[:, step] = 0.9 * noise[:, step - 1] + np.sqrt(1 - 0.9**2) * noise[:, step]
    return (0.7 * (x + 0.4 * noise) + 0.2).astype(np.float32)


def begin(model: Any, start: str, samples: Array) -> Any:
    """What a run starts from; the given model stays as it is."""
    from tf_keras import layers, models

    if start not in BASELINES:
        return convert(model, start, "auto", samples)
    copy = models.clone_model(model)
    copy.set_weights(model.get_weights())
    for layer in copy.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = start == "BN trainable"
    return copy


def make_training(model: Any) -> Callable[[Array, Array, float, bool], None]:
    """A function that trains the model on batches, compiled once for all their sizes.

    It takes inputs and targets, both with two leading axes, of steps and of a batch, the learning
    rate, and whether to begin anew with the weights that the model has now.
    """
    import tensorflow as tf
    import tf_keras

    variables = model.trainable_variables
    weights = model.get_weights()
    optimizer = tf_keras.optimizers.SGD(0.0, momentum=0.9)
    optimizer.build(variables)
    shape = (None, None, *model.input_shape[1:])

    @tf.function(
        input_signature=(tf.TensorSpec(shape, tf.float32), tf.TensorSpec((None, None), tf.int64))
    )
    def steps(x: Any, y: Any) -> None:
        for step in tf.range(tf.shape(x)[0]):
            with tf.GradientTape() as tape:
                answer = model(x[step], training=True)
                losses = tf_keras.losses.sparse_categorical_crossentropy(y[step], answer)
                loss = tf.reduce_mean(losses)
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    def run(x: Array, y: Array, rate: float, anew: bool) -> None:
        if anew:
            model.set_weights(weights)
            for variable in optimizer.variables:
                variable.assign(tf.zeros_like(variable))
        optimizer.learning_rate = rate
        steps(tf.constant(x), tf.constant(y, tf.int64))

    return run


def measure(keys: Iterable[Key]) -> Iterable[Record]:
    """The records of runs; those of one start should follow each other."""
    import tf_keras

    for (name, seed), group in itertools.groupby(keys, key=lambda key: key[:2]):
        tf_keras.backend.clear_session()
        source, unchanged = trained(name, seed, MODELS)
        data = {"same": unchanged, "shifted": shifted(unchanged, seed)}
        for (kind, start), runs in itertools.groupby(group, key=lambda key: key[2:4]):
            model = begin(source, start, data[kind].x_train[:SAMPLES])
            yield from _runs(model, data[kind], list(runs))


def _runs(model: Any, data: Data, keys: Sequence[Key]) -> Iterable[Record]:
    name, seed, kind, start = keys[0][:4]
    order = np.random.default_rng(seed).permutation(len(data.x_train))[:SEEN]
    before = score(name, model, data)
    train = make_training(model)
    for *_, rate, batch in keys:
        started = time.perf_counter()
        chosen = order.reshape(-1, batch)
        third = len(chosen) // 3
        accuracies = [before]
        for part in (chosen[:third], chosen[third:]):
            anew = len(accuracies) == 1
            train(data.x_train[part], data.y_train[part], rate * batch, anew)
            accuracies.append(score(name, model, data))
        yield {
            "network": name,
            "seed": seed,
            "data": kind,
            "start": start,
            "rate": rate,
            "batch": batch,
            "accuracy": accuracies,
            "finite": all(np.isfinite(weight).all() for weight in model.get_weights()),
            "seconds": time.perf_counter() - started,
        }


def read() -> dict[Key, Record]:
    """What earlier runs found."""
    if not RECORDS.exists():
        return {}
    records = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    names = ("network", "seed", "data", "start", "rate", "batch")
    return {tuple(record[name] for name in names): record for record in records}


def run(keys: Sequence[Key]) -> None:
    """Runs what is missing."""
    RECORDS.parent.mkdir(exist_ok=True)
    known = read()
    for record in measure(key for key in keys if key not in known):
        line = json.dumps(record)
        print(line, flush=True)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def wanted(names: Iterable[str]) -> list[Key]:
    """The reported runs."""
    return [
        (name, seed, kind, start, rate, batch)
        for seed, name in itertools.product(REPORTED_SEEDS, names)
        for kind, start, rate, batch in itertools.product(KINDS, STARTS, RATES[name], BATCHES)
    ]


def tried(names: Iterable[str]) -> list[Key]:
    """The runs on the development seeds that choose the rates."""
    cells = itertools.product(names, DEVELOPMENT_SEEDS, KINDS, STARTS, CANDIDATES, (MIDDLE,))
    return list(cells)


def compare_rates(name: str, records: Mapping[Key, Record]) -> str:
    """A table of the mean end of each start for each candidate.

    Raises:
        ValueError: `RATES` isn't what follows from it.
    """
    rows, overall = {}, {}
    for rate in CANDIDATES:
        means = [
            statistics.mean(
                records[name, seed, kind, start, rate, MIDDLE]["accuracy"][-1]
                for seed, kind in itertools.product(DEVELOPMENT_SEEDS, KINDS)
            )
            for start in STARTS
        ]
        overall[rate] = statistics.mean(means)
        rows[f"{rate:g}"] = [f"{mean:.3f}" for mean in means] + [f"{overall[rate]:.4f}"]
    best = sorted(overall, key=lambda rate: -overall[rate])
    chosen = tuple(rate for rate in best if overall[rate] > overall[best[0]] - TIE)
    if chosen != RATES[name]:
        raise ValueError(f"{name}: the rates are {chosen}, not {RATES[name]}")
    return pages.table((f"{name}, rate", *STARTS, "mean"), rows)


def failed(record: Record, records: Mapping[Key, Record]) -> bool:
    """Whether it diverged, or ended clearly below what BN knew of this data before."""
    keys = (record[part] for part in ("network", "seed", "data"))
    rate, batch = record["rate"], record["batch"]
    floor = records[(*keys, "BN frozen", rate, batch)]["accuracy"][0] - TOLERANCE
    return not record["finite"] or record["accuracy"][-1] < floor


def write(records: Mapping[Key, Record]) -> None:
    """Writes the section: how the rates were chosen, the runs, and the summaries."""
    parts = [
        "Rates per input, on the development seeds: mean accuracy at the end.\n",
        *(compare_rates(name, records) for name in RATES),
        "The runs on the reported seeds.\n",
    ]
    for name, rates in RATES.items():
        parts += [_table(records, name, rate, kind) for rate in rates for kind in KINDS]
    parts += [_summary(records, dict(zip(RATES, r, strict=True))) for r in _choices()]
    pages.replace(PAGE, "fine-tuning", "\n".join(parts))


def _choices() -> Iterable[tuple[float, ...]]:
    """One rate for each network, in every way."""
    return itertools.product(*RATES.values())


def _table(records: Mapping[Key, Record], name: str, rate: float, kind: str) -> str:
    rows = {}
    for start in STARTS:
        rows[start] = []
        for batch in BATCHES:
            keys = [(name, seed, kind, start, rate, batch) for seed in REPORTED_SEEDS]
            found = [records[key] for key in keys]
            stages = list(zip(*(record["accuracy"] for record in found), strict=True))
            text = " / ".join(f"{statistics.mean(stage):.3f}" for stage in stages)
            text += f" ± {statistics.stdev(stages[-1]):.3f}"
            failures = sum(failed(record, records) for record in found)
            rows[start].append(f"{text} ({failures} failed)" if failures else text)
    head = (f"{name}, {kind}, rate {rate:g}", *(f"batch {batch}" for batch in BATCHES))
    return pages.table(head, rows)


def _summary(records: Mapping[Key, Record], rates: Mapping[str, float]) -> str:
    chosen = [
        record
        for record in records.values()
        if record["seed"] in REPORTED_SEEDS and record["rate"] == rates[record["network"]]
    ]
    rows: dict[str, list[str]] = {start: [] for start in STARTS}
    head = [""]
    for kind in KINDS:
        head += [f"{kind}: end", *(f"− {start}" for start in BASELINES), "failed"]
        runs = {
            start: [r for r in chosen if (r["data"], r["start"]) == (kind, start)]
            for start in STARTS
        }
        ends = {start: statistics.mean(r["accuracy"][-1] for r in runs[start]) for start in STARTS}
        for start in STARTS:
            differences = [f"{ends[start] - ends[baseline]:+.3f}" for baseline in BASELINES]
            failures = sum(failed(record, records) for record in runs[start])
            count = f"{failures} of {len(runs[start])}"
            rows[start] += [f"{ends[start]:.3f}", *differences, count]
    said = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    note = (
        f"Means over all networks, seeds and batch sizes, with the rates {said}. Failed: the "
        f"weights aren't finite, or the accuracy ends more than {TOLERANCE:g} below that of the "
        f"BN model before it was trained on.\n\n"
    )
    return note + pages.table(head, rows)


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing and writes the section."""
    names = [argument for argument in arguments if argument != "--rates"] or list(RATES)
    if unknown := [name for name in names if name not in RATES]:
        sys.exit(f"unknown: {', '.join(unknown)}; known: {', '.join(RATES)}")
    if "--rates" in arguments:
        run(tried(names))
        for name in names:
            print(compare_rates(name, read()))
        return
    run(wanted(names))
    known, keys = read(), [*tried(RATES), *wanted(RATES)]
    records = {key: known[key] for key in keys if key in known}
    if len(records) < len(keys):
        print(f"{len(records)} of {len(keys)} are there; the section is written when all are")
        return
    write(records)


if __name__ == "__main__":
    main(sys.argv[1:])
