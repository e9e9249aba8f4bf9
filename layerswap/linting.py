"""`check` as a whole: files loaded or not, proven in runtimes, many at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from layerswap import catalog, checking
from layerswap.atomic import StrPath
from layerswap.comparison import measure_drift
from layerswap.criteria import Criteria
from layerswap.errors import ExportError, LoadError, UsageError
from layerswap.formats.results import describe_parity
from layerswap.policy import Policy
from layerswap.records import Finding, Report
from layerswap.references import OTHER_FILE, load_reference, reference_path
from layerswap.verifying import report_parity

# A process more takes about as long to start as these to check.
_FILES_PER_JOB = 100
_BYTES_PER_JOB = 1 << 28


def check(
    path: StrPath,
    *,
    load: bool = False,
    custom_objects: Mapping[str, Any] | None = None,
    unsafe: bool = False,
    criteria: Criteria | Mapping[str, Any] | None = None,
    **fields: Any,
) -> Report:
    """Says what is wrong with a model file, and lists its normalization layers.

    Without `load`, TensorFlow isn't needed: what tf_keras would build is read from the file's
    configuration. What that doesn't tell, such as a class of the user's own, is a finding of the
    severity `undetermined`.

    Args:
        path: a `.keras` or `.h5` file, a SavedModel folder or an `.onnx` file.
        load: load a Keras model and look at its live layers; an `.onnx` file needs no loading.
        custom_objects, unsafe: as for `load`.
        criteria: what it is judged by; or give the fields of `Criteria` as keyword arguments, and
            `groups` or `channels_per_group` as those of a policy.

    Returns:
        A report: its `exit_code` is 1 where a finding is an error, else 3 where something is
        undetermined, else 0.

    Raises:
        LoadError: it can't be read as a model.
        MissingExtraError: `load` without tensorflow or tf_keras, or a runtime that isn't there.
        UsageError: what only a load can use is given without `load`, or a field is wrong.
    """
    if criteria is not None and fields:
        raise UsageError("give either criteria or its fields, not both")
    if not isinstance(criteria, Criteria):
        criteria = _as_criteria(criteria or fields)
    if not load and (custom_objects or unsafe):
        raise UsageError(
            "custom objects and unsafe matter only to a model that is loaded",
            hint="Add --load on the command line, load=True in Python.",
        )
    own = criteria.for_file(Path(path).as_posix())
    if checking.is_onnx(path) or not load:
        return checking.check_file(path, own, prove(path, own))
    from layerswap.layer_rules import judge_layers
    from layerswap.swapping import as_model

    model, source = as_model(path, custom_objects=custom_objects, unsafe=unsafe)
    from layerswap.keras_graph import listing

    checked, findings = listing.check_model(model, source)
    findings += judge_layers(checked.layers, own)
    if own.weights:
        findings += checking.judge_weights(Path(path))
    return checking.checked_report(checked, [*findings, *prove(path, own)], own)


def _as_criteria(fields: Mapping[str, Any]) -> Criteria:
    sizes = {name: fields[name] for name in ("groups", "channels_per_group") if name in fields}
    if not sizes:
        return Criteria(**fields)
    others = {name: value for name, value in fields.items() if name not in sizes}
    if "policy" in others:
        raise UsageError("give either a policy or its groups, not both")
    return Criteria(**others, policy=Policy(**sizes))


def prove(path: StrPath, criteria: Criteria) -> Iterator[Finding]:
    """What an ONNX file's reference says of it: LS801 to LS803; of others, that they have none.

    Raises:
        MissingExtraError: a runtime isn't installed.
    """
    place = criteria.reference or reference_path(path)
    run, drift = bool(criteria.runtime or criteria.reference), criteria.max_drift is not None
    if not (run or drift):
        return
    if not checking.is_onnx(path):  # one of several, perhaps: no reason to stop, but to say it
        yield catalog.find("parity" if run else "drift").finding(
            "",
            "isn't proven: runtime, reference and max_drift are about ONNX files",
            "layerswap verify runs a SavedModel; convert compares what it writes.",
            severity="info",
        )
        return
    try:
        load_reference(place)
    except LoadError as error:  # nothing is proven then, but all else can be judged
        for rule, asked in (("parity", run), ("drift", drift)):
            if asked:
                yield catalog.find(rule).finding(
                    os.fspath(place), error.message, error.hint, severity="undetermined"
                )
        return
    for runtime in (criteria.runtime or (None,)) if run else ():
        yield from _run(path, criteria.reference, runtime)
    if criteria.max_drift is not None:
        yield from _judge_drift(place, criteria.max_drift)


def _run(path: StrPath, reference: str | None, runtime: str | None) -> Iterator[Finding]:
    try:
        report = report_parity(path, reference, runtime=runtime)
    except (LoadError, ExportError) as error:
        yield catalog.find("runtime-failed").finding(runtime or "", error.message, error.hint)
        return
    for parity in report.parity:
        if not parity.ok:
            yield catalog.find("parity").finding(parity.worst_output, describe_parity(parity))
    for finding in report.findings:
        if finding.code == "runtime-failed":  # of all runtimes; missing ones weren't asked for
            yield catalog.find("runtime-failed").finding(
                finding.where, finding.message, finding.hint
            )
        elif finding.code == "checksum-mismatch":
            place = os.fspath(reference or reference_path(path))
            yield catalog.find("checksum-mismatch").finding(place, OTHER_FILE)


def _judge_drift(reference: StrPath, most: float) -> Iterator[Finding]:
    known, drift = load_reference(reference), None
    if known.source_outputs is not None:
        drift = measure_drift(known.source_outputs, known.outputs)
    if drift is None:
        yield catalog.find("drift").finding(
            os.fspath(reference),
            "holds no numbers that the BN model answered, so the drift isn't known",
            "Convert the BN model anew: layerswap convert writes them.",
            severity="undetermined",
        )
    elif not drift.relative_error <= most:
        yield catalog.find("drift").finding(
            os.fspath(reference),
            f"relative error {drift.relative_error:.3g} against the BN model, allowed {most:g}",
        )


def check_files(
    paths: Sequence[str],
    criteria: Criteria,
    *,
    jobs: int | None = None,
    progress: Callable[..., None],
    **loading: Any,
) -> Report:
    """What `check` says of each file; one that can't be read is a finding, and the others go on.

    Args:
        paths: the files, in the order of the report.
        criteria: what they are judged by.
        jobs: how many processes; None: as many as the files and the machine are worth.
        progress: called with the stage, how many are done and how many there are.
        loading: `load`, `custom_objects` and `unsafe` of `check`.

    Raises:
        LoadError: a process died.
        MissingExtraError, UsageError: as for `check`.
    """
    one = partial(_check_one, criteria=criteria, loading=loading)
    count = 1 if loading.get("load") else min(jobs or _worth(paths), len(paths))
    reports = []
    for report in map(one, paths) if count < 2 else _in_processes(one, paths, count):
        reports.append(report)
        progress("check", len(reports), len(paths))
    return checking.merge_reports(reports)


def _check_one(path: str, criteria: Criteria, loading: Mapping[str, Any]) -> Report:
    try:
        return check(path, criteria=criteria, **loading)
    except LoadError as error:
        return checking.unreadable_report(path, error, criteria)


def _in_processes(
    one: Callable[[str], Report], paths: Sequence[str], count: int
) -> Iterator[Report]:
    # Fresh processes: a fork of one with threads may hang.
    pool = ProcessPoolExecutor(count, get_context("spawn"), _end_with_parent)
    try:
        with _interrupts_held():
            reports = pool.map(one, paths, chunksize=max(1, len(paths) // (8 * count)))
        yield from reports
    except BrokenProcessPool as error:
        raise LoadError(
            "a process that checked some of the files died",
            where=f"{len(paths)} files",
            hint="Memory may have run out: try --jobs 1, which also shows which file it is.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds back interrupts while processes start, and for them for ever: the parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Sees to it that a process doesn't wait for work from a parent that was killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _worth(paths: Sequence[str]) -> int:
    size = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    wanted = 1 + max(len(paths) // _FILES_PER_JOB, size // _BYTES_PER_JOB)
    return min(wanted, os.cpu_count() or 1)
