"""The commands that judge files, without TensorFlow where possible: verify, check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from layerswap.cli.options import Loading, criteria_options, load_options, report_options
from layerswap.cli.reporting import Output
from layerswap.runtimes import ALL, RUNTIMES

if TYPE_CHECKING:
    from layerswap.criteria import Criteria

# From here on checking files takes long enough to say how far it is.
MANY = 100


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
@criteria_options
@click.option("--load", is_flag=True, help="Load Keras models, to decide what files don't say.")
@load_options
@click.option("--jobs", type=click.IntRange(min=1), help="Processes. Default: as many as pay off.")
@report_options
def check(
    files: tuple[str, ...],
    load: bool,
    jobs: int | None,
    criteria: Criteria,
    loading: Loading,
    output: Output,
) -> int:
    """Judge each FILE (.keras, .h5, SavedModel or .onnx): is a BatchNormalization left, are the
    groups legal, the operators standard, the numbers safe?

    `layerswap rule` lists all rules. Needs no TensorFlow without --load. Exit code 1: a finding is
    an error; else 3: a file can't be read, or something isn't known; else 0.
    """
    output.check(*files)
    from layerswap import linting

    if load:
        from layerswap import exporting
        from layerswap.keras_graph.startup import start_tensorflow

        exporting.require_keras()
        start_tensorflow()
    long = load or bool(criteria.runtime) or len(files) > MANY
    with output.progress(long) as say:
        report = linting.check_files(
            list(dict.fromkeys(files)),
            criteria,
            jobs=jobs,
            progress=say,
            load=load,
            **loading.fields(),
        )
    return output.finish(report)
