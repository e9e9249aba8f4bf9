"""The commands: thin, each parses its options, calls one function and prints its report."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from layerswap.errors import ExportError, LayerswapError, UsageError

if TYPE_CHECKING:
    from layerswap.policy import Policy
    from layerswap.records import Report

_F = TypeVar("_F", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="layerswap")
def cli() -> None:
    """Swap BatchNormalization for GroupNormalization in trained tf_keras models, keep what they
    learned, and export with proof.

    Exit codes: 0 fine; 1 the model has findings (refusals, indivisible channels, parity beyond
    tolerance); 2 usage or policy; 3 could not run; 130 interrupted.
    """


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def decorate(command: _F) -> _F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# Values are JSON where they are JSON; `Policy` validates them, here as everywhere.
_PARTS = [
    click.option(f"--{variable}-{kind}", metavar="VALUE", help=f"Keras {kind} of {letter}.")
    for kind in ("initializer", "regularizer", "constraint")
    for variable, letter in (("beta", "β"), ("gamma", "γ"))
]

policy_options = _options(
    click.option("--groups", metavar="N|-1|auto", help="Number of groups. Default: auto."),
    click.option("--channels-per-group", metavar="N", help="Instead of --groups."),
    click.option("--allow-degenerate", is_flag=True, help="Accept groups of a single element."),
    click.option(
        "--on-indivisible", metavar="error|nearest|skip", help="Where C % groups isn't 0."
    ),
    click.option("--epsilon", metavar="NUMBER|carry|adaptive", help="Of the GroupNormalization."),
    click.option("--adaptive-k", metavar="NUMBER", help="Factor of the adaptive epsilon."),
    click.option("--axis", metavar="N|carry", help="The normalised axis."),
    click.option("--center", metavar="true|false|carry", help="Whether there is a β."),
    click.option("--scale", metavar="true|false|carry", help="Whether there is a γ."),
    *_PARTS,
    click.option("--include", multiple=True, metavar="GLOB", help="Only these layer paths."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Not these layer paths."),
    click.option(
        "--overrides",
        multiple=True,
        nargs=2,
        metavar="GLOB JSON",
        help="Other fields for some paths; the first match applies.",
    ),
    click.option("--weights", metavar="match|copy|reset", help="How γ and β are computed."),
    click.option("--config", metavar="FILE", help="TOML with these fields; options win over it."),
)

load_options = _options(
    click.option(
        "--custom-objects",
        multiple=True,
        metavar="MODULE:NAME",
        help="A class or function that the model needs; imported, so its module's code runs.",
    ),
    click.option("--unsafe", is_flag=True, help="Run code that the file holds (Lambda layers)."),
)

report_options = _options(
    click.option(
        "--report-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="How the report is written.",
    ),
    click.option("--output-file", metavar="FILE", help="Where the report goes instead of stdout."),
    click.option("--force", is_flag=True, help="Replace existing files."),
    click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
)


@cli.command()
@click.argument("model")
@policy_options
@load_options
@report_options
def plan(
    model: str,
    custom_objects: tuple[str, ...],
    unsafe: bool,
    report_format: str,
    output_file: str | None,
    force: bool,
    quiet: bool,
    **fields: Any,
) -> int:
    """Show what would become of every BatchNormalization of MODEL (.keras, .h5 or SavedModel)."""
    from dataclasses import replace

    policy = _policy(fields)
    _check_report(output_file, force, model)
    from layerswap import conversion, exporting
    from layerswap.keras_graph.startup import start_tensorflow
    from layerswap.records import Report

    exporting.require_keras()
    with _progress(quiet) as say:
        say("load")
        start_tensorflow()
        loaded = conversion.load(model, custom_objects=_import(custom_objects), unsafe=unsafe)
        say("plan")
        made = replace(conversion.plan(loaded, policy), source=model)
    report = Report("plan", model, plan=made, findings=made.notes)
    return _finish(report, report_format, output_file, force)


@cli.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option(
    "--format",
    type=click.Choice(["keras", "h5", "savedmodel", "onnx"]),
    help="Of OUT; by default from its suffix, none meaning SavedModel.",
)
@click.option("--opset", type=int, default=18, show_default=True, help="Of an ONNX file.")
@click.option("--no-verify", is_flag=True, help="Don't run what was written.")
@click.option("--keep-failed", is_flag=True, help="Keep an ONNX file that fails as OUT.failed.")
@click.option("--allow-no-batchnorm", is_flag=True, help="Export a model without BN, too.")
@policy_options
@load_options
@report_options
def convert(
    source: str,
    target: str,
    format: Any,
    opset: int,
    no_verify: bool,
    keep_failed: bool,
    allow_no_batchnorm: bool,
    custom_objects: tuple[str, ...],
    unsafe: bool,
    report_format: str,
    output_file: str | None,
    force: bool,
    quiet: bool,
    **fields: Any,
) -> int:
    """Load IN, swap every BatchNormalization, write OUT and prove that it computes the same."""
    from layerswap import conversion
    from layerswap.keras_graph.startup import start_tensorflow

    policy = _policy(fields)
    _check_report(output_file, force, source, target, f"{target}.ref.npz")
    try:
        with _progress(quiet) as say:
            # TensorFlow comes with the first stage: what can be said without it is said at once.
            def announce(stage: str) -> None:
                say(stage)
                start_tensorflow()

            if custom_objects:
                start_tensorflow()
            report = conversion.convert(
                source,
                target,
                policy,
                format=format,
                opset=opset,
                overwrite=force,
                verify=not no_verify,
                keep_failed=keep_failed,
                allow_no_batchnorm=allow_no_batchnorm,
                custom_objects=_import(custom_objects),
                unsafe=unsafe,
                progress=announce,
            )
    except LayerswapError as error:
        # A problem of the model is a result, too: whoever asked for a report gets one.
        if error.exit_code == 1 and (report_format != "text" or output_file):
            _finish(_failed(error, source), report_format, output_file, force)
        raise
    return _finish(report, report_format, output_file, force)


def _failed(error: LayerswapError, source: str) -> Report:
    from layerswap.records import Finding, Report

    finding = Finding(error.code, "error", error.where, error.message, error.hint)
    return Report("convert", source, plan=getattr(error, "plan", None), findings=(finding,))


@cli.command()
@click.argument("artifact", metavar="FILE.onnx")
@click.option("--reference", metavar="FILE", help="By default FILE.onnx.ref.npz.")
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "reference"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the file; 'reference' is onnx's own evaluator.",
)
@click.option("--atol", type=float, help="Absolute tolerance, instead of the reference's.")
@click.option("--rtol", type=float, help="Relative tolerance, of the output's largest value.")
@report_options
def verify(
    artifact: str,
    reference: str | None,
    runtime: str,
    atol: float | None,
    rtol: float | None,
    report_format: str,
    output_file: str | None,
    force: bool,
    quiet: bool,
) -> int:
    """Run FILE.onnx on its reference inputs and compare with Keras; needs no TensorFlow."""
    del quiet
    _check_report(output_file, force, artifact, reference or f"{artifact}.ref.npz")
    from layerswap import checking

    report = checking.report_parity(
        artifact, reference, runtime=runtime, absolute=atol, relative=rtol
    )
    return _finish(report, report_format, output_file, force)


@cli.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--load", is_flag=True, help="Load Keras models, to decide what files don't say.")
@load_options
@report_options
def check(
    files: tuple[str, ...],
    load: bool,
    custom_objects: tuple[str, ...],
    unsafe: bool,
    report_format: str,
    output_file: str | None,
    force: bool,
    quiet: bool,
) -> int:
    """Prove that no BatchNormalization is left in each FILE (.keras, .h5, SavedModel or .onnx).

    Needs no TensorFlow without --load. Exit code 1: one is left in a file; else 3: a file can't
    be read, or holds something outside tf_keras that the file alone doesn't explain; else 0.
    """
    _check_report(output_file, force, *files)
    from layerswap import checking, conversion
    from layerswap.errors import LoadError

    if load:
        from layerswap import exporting
        from layerswap.keras_graph.startup import start_tensorflow

        exporting.require_keras()
        start_tensorflow()
    known = _import(custom_objects)
    reports = []
    with _progress(quiet or not load) as say:
        for file in dict.fromkeys(files):
            say(f"check {file}")
            try:
                report = conversion.check(file, load, known, unsafe)
            except LoadError as error:
                report = checking.unreadable_report(file, error)
            reports.append(report)
    return _finish(checking.merge_reports(reports), report_format, output_file, force)


@cli.command()
@click.option("--finetune", is_flag=True, help="Also train on at batch size 2 and compare.")
@click.option("--output-dir", metavar="DIR", help="Where the ONNX file goes. Default: demo-output.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def demo(finetune: bool, output_dir: str | None) -> int:
    """Convert a bundled digits network naively and matched, and show what each keeps."""
    from layerswap import exporting
    from layerswap.demo import run_demo
    from layerswap.keras_graph.startup import start_tensorflow

    exporting.require_keras()
    exporting.open_runtime()
    start_tensorflow()
    run_demo(finetune, None if output_dir is None else Path(output_dir))
    return 0


def _policy(fields: dict[str, Any]) -> Policy:
    from layerswap import settings

    config = fields.pop("config")
    overrides = settings.parse_overrides(fields.pop("overrides"))
    options: dict[str, Any] = {"overrides": overrides} if overrides else {}
    for name, value in fields.items():
        if isinstance(value, tuple | bool):
            options |= {name: value} if value else {}
        elif value is not None:
            options[name] = settings.parse_value(value)
    return settings.read_policy(options, config, Path.cwd())


def _import(names: tuple[str, ...]) -> dict[str, Any]:
    """The objects that `MODULE:NAME` names, by their last name."""
    found = {}
    for text in names:
        module, _, name = text.partition(":")
        if not module or not name:
            raise UsageError(f"--custom-objects {text}: expected MODULE:NAME")
        if (here := os.getcwd()) not in sys.path:
            sys.path.insert(0, here)
        try:
            value: Any = importlib.import_module(module)
            for part in name.split("."):
                value = getattr(value, part)
        except Exception as error:  # whatever the user's module raises
            raise UsageError(
                f"--custom-objects {text}: {type(error).__name__}: {error}",
                hint="The module is looked for in the current folder and on PYTHONPATH.",
            ) from error
        found[name.rpartition(".")[2]] = value
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Says on stderr which stage runs: a spinner in a terminal, lines elsewhere."""
    if quiet:
        yield lambda stage: None
    elif sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("start") as status:
            yield status.update
    else:
        yield lambda stage: click.echo(f"{stage} ...", err=True)


def _check_report(output_file: str | None, force: bool, *others: str) -> None:
    if output_file is None:
        return
    from layerswap.atomic import check_target

    taken = {os.path.realpath(other) for other in others}
    if os.path.realpath(output_file) in taken:
        raise UsageError("the report would replace the model or its reference", where=output_file)
    check_target(output_file, force)


def _finish(report: Report, report_format: str, output_file: str | None, force: bool) -> int:
    from layerswap.render import render

    if output_file is None:
        width = os.get_terminal_size().columns if sys.stdout.isatty() else None
        _print(render(report, report_format, width))
    else:
        from layerswap.atomic import replacing

        with replacing(output_file, force) as temporary:
            # A file's name needs not be text; what can't be encoded is escaped.
            temporary.write_text(render(report, report_format), "utf-8", "backslashreplace")
    return report.exit_code


def _print(text: str) -> None:
    try:
        click.echo(text, nl=False)
    except OSError as error:
        # The interpreter would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # else whoever reads has enough
            raise ExportError(
                f"the report can't be written: {error.strerror or error}",
                where="standard output",
                hint="Everything else is done. Free some space, or see --output-file.",
            ) from error
