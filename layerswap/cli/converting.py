"""The commands that read Keras models: plan, convert, export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerswap.cli.options import (
    Loading,
    debug_option,
    distill_option,
    export_options,
    load_options,
    policy_options,
    report_options,
    sample_options,
)
from layerswap.cli.reporting import Output

if TYPE_CHECKING:
    from layerswap.policy import Policy


@click.command()
@click.argument("model")
@policy_options
@load_options
@report_options
def plan(model: str, policy: Policy, loading: Loading, output: Output) -> int:
    """Show what would become of every BatchNormalization of MODEL (.keras, .h5 or SavedModel)."""
    from dataclasses import replace

    output.check(model)
    from layerswap import conversion, exporting
    from layerswap.keras_graph.startup import start_tensorflow
    from layerswap.records import Report

    exporting.require_keras()
    with output.progress() as say:
        say("load")
        start_tensorflow()
        loaded = conversion.load(model, **loading.fields())
        say("plan")
        made = replace(conversion.plan(loaded, policy), source=model)
    return output.finish(Report("plan", model, plan=made, findings=made.notes))


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option("--allow-no-batchnorm", is_flag=True, help="Export a model without BN, too.")
@sample_options
@distill_option
@policy_options
@export_options
@load_options
@report_options
def convert(
    source: str,
    target: str,
    allow_no_batchnorm: bool,
    distill: int,
    sampling: dict[str, Any],
    policy: Policy,
    export: dict[str, Any],
    loading: Loading,
    output: Output,
) -> int:
    """Load IN, swap every BatchNormalization, write OUT and prove that it computes the same."""
    from layerswap import conversion

    _check_report(output, source, target)
    with output.failures("convert", source), output.progress() as say:
        report = conversion.convert(
            source,
            target,
            policy,
            allow_no_batchnorm=allow_no_batchnorm,
            distill=distill,
            progress=_starting_tensorflow(say, loading, sampling),
            **sampling,
            overwrite=output.force,
            **export,
            **loading.fields(),
        )
    return output.finish(report)


@click.command()
@click.argument("model")
@sample_options
@policy_options
@load_options
@report_options
def advise(
    model: str, sampling: dict[str, Any], policy: Policy, loading: Loading, output: Output
) -> int:
    """Say whether to swap MODEL, and with how many groups each layer; nothing is changed.

    With --samples all is measured on them, else predicted from the moving statistics.
    """
    from dataclasses import replace

    output.check(model)
    from layerswap import conversion, exporting

    exporting.require_keras()
    with output.failures("advise", model), output.progress() as say:
        announce = _starting_tensorflow(say, loading, sampling)
        announce("load")
        loaded = conversion.load(model, **loading.fields())
        report = conversion.advise(loaded, policy=policy, progress=announce, **sampling)
    return output.finish(replace(report, source=model))


@click.command("export")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@export_options
@load_options
@report_options
def export_model(
    source: str, target: str, export: dict[str, Any], loading: Loading, output: Output
) -> int:
    """Write IN as OUT without swapping anything, and prove that it computes the same.

    GroupNormalization that IN holds already is decomposed as after a swap.
    """
    from layerswap import conversion

    _check_report(output, source, target)
    with output.failures("export", source), output.progress() as say:
        report = conversion.report_export(
            source,
            target,
            progress=_starting_tensorflow(say, loading, {}),
            overwrite=output.force,
            **export,
            **loading.fields(),
        )
    return output.finish(report)


def _check_report(output: Output, source: str, target: str) -> None:
    from layerswap.references import data_path, reference_path

    output.check(source, target, str(reference_path(target)), str(data_path(target)))


def _starting_tensorflow(say: Any, loading: Loading, sampling: dict[str, Any]) -> Any:
    """Progress that brings TensorFlow with the first stage.

    What can be said without it is said at once.
    """
    from layerswap.keras_graph.startup import start_tensorflow

    def announce(*step: Any) -> None:
        say(*step)
        start_tensorflow()

    if loading.custom_objects or callable(sampling.get("samples")):
        start_tensorflow()
    return announce


@click.command()
@click.option("--finetune", is_flag=True, help="Also train on at batch size 2 and compare.")
@click.option("--output-dir", metavar="DIR", help="Where the ONNX file goes. Default: demo-output.")
@debug_option
def demo(finetune: bool, output_dir: str | None) -> int:
    """Convert a bundled digits network naively and matched, and show what each keeps."""
    from layerswap import exporting, verifying
    from layerswap.demo import run_demo
    from layerswap.keras_graph.startup import start_tensorflow

    exporting.require_keras()
    verifying.open_runtime("demo.onnx")
    start_tensorflow()
    run_demo(finetune, None if output_dir is None else Path(output_dir))
    return 0
