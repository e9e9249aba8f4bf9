"""The commands that judge files, without TensorFlow where possible: verify, check."""

from __future__ import annotations

import click

from layerswap.cli.options import Loading, load_options, report_options
from layerswap.cli.reporting import Output
from layerswap.runtimes import ALL, RUNTIMES


@click.command()
@click.argument("artifact")
@click.option("--reference", metavar="FILE", help="By default ARTIFACT.ref.npz.")
@click.option(
    "--runtime",
    type=click.Choice([*RUNTIMES, ALL]),
    help="What runs it; 'reference' is onnx's own evaluator, 'all' every one that is installed. "
    "Default: onnxruntime, for a SavedModel savedmodel.",
)
@click.option("--atol", type=float, help="Absolute tolerance, instead of the reference's.")
@click.option("--rtol", type=float, help="Relative tolerance, of the output's largest value.")
@report_options
def verify(
    artifact: str,
    reference: str | None,
    runtime: str | None,
    atol: float | None,
    rtol: float | None,
    output: Output,
) -> int:
    """Run ARTIFACT on its reference inputs and compare with what Keras answered.

    An .onnx file needs no TensorFlow, a SavedModel folder no tf_keras.
    """
    from layerswap import verifying
    from layerswap.references import reference_path

    output.check(artifact, reference or str(reference_path(artifact)))

    report = verifying.report_parity(
        artifact, reference, runtime=runtime, absolute=atol, relative=rtol
    )
    return output.finish(report)


@click.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--load", is_flag=True, help="Load Keras models, to decide what files don't say.")
@load_options
@report_options
def check(files: tuple[str, ...], load: bool, loading: Loading, output: Output) -> int:
    """Prove that no BatchNormalization is left in each FILE (.keras, .h5, SavedModel or .onnx).

    Needs no TensorFlow without --load. Exit code 1: one is left in a file; else 3: a file can't
    be read, or holds something outside tf_keras that the file alone doesn't explain; else 0.
    """
    output.check(*files)
    from layerswap import checking, conversion
    from layerswap.errors import LoadError

    if load:
        from layerswap import exporting
        from layerswap.keras_graph.startup import start_tensorflow

        exporting.require_keras()
        start_tensorflow()
    known = loading.fields()
    reports = []
    with output.progress() as say:
        for file in dict.fromkeys(files):
            if load:
                say(f"check {file}")
            try:
                report = conversion.check(file, load, **known)
            except LoadError as error:
                report = checking.unreadable_report(file, error)
            reports.append(report)
    return output.finish(checking.merge_reports(reports))
