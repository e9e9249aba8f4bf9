"""Options that several commands share; each group of them reaches a command as one object."""

from __future__ import annotations

import functools
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerswap.cli.reporting import Output
from layerswap.errors import UsageError
from layerswap.formats import FORMATS

if TYPE_CHECKING:
    from layerswap.criteria import Criteria
    from layerswap.policy import Policy

Command = Callable[..., Any]


def _grouped(
    name: str, make: Callable[..., Any], *options: Callable[[Command], Command]
) -> Callable[[Command], Command]:
    """A decorator that adds options to a command, which gets what `make` makes of their values."""

    def decorate(command: Command) -> Command:
        own = [parameter.name for parameter in _parameters(options)]

        @functools.wraps(command)
        def call(**values: Any) -> Any:
            made = make(**{option: values.pop(option) for option in own if option in values})
            return command(**values, **{name: made})

        decorated: Command = call
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def _parameters(options: tuple[Callable[[Command], Command], ...]) -> list[click.Parameter]:
    def nothing() -> None:
        pass

    for option in options:
        option(nothing)
    parameters: list[click.Parameter] = nothing.__click_params__  # type: ignore[attr-defined]
    return parameters


def _read_policy(config: str | None, overrides: Any, **values: Any) -> Policy:
    """Values are JSON where they are JSON; `Policy` validates them, here as everywhere."""
    from layerswap import settings

    pairs = settings.parse_overrides(overrides)
    options: dict[str, Any] = {"overrides": pairs} if pairs else {}
    for name, value in values.items():
        if isinstance(value, tuple | bool):
            options |= {name: value} if value else {}
        elif value is not None:
            options[name] = settings.parse_value(value)
    return settings.read_policy(options, config, Path.cwd())


policy_options = _grouped(
    "policy",
    _read_policy,
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
    *(
        click.option(f"--{variable}-{kind}", metavar="VALUE", help=f"Keras {kind} of {letter}.")
        for kind in ("initializer", "regularizer", "constraint")
        for variable, letter in (("beta", "β"), ("gamma", "γ"))
    ),
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


def _read_criteria(config: str | None, **values: Any) -> Criteria:
    """Options that were given; `Criteria` and `Policy` validate them."""
    from layerswap import settings

    options: dict[str, Any] = {}
    for name, value in values.items():
        if name == "severity":
            options |= {name: dict(_parse_severity(text) for text in value)} if value else {}
        elif isinstance(value, tuple | bool):
            options |= {name: value} if value else {}
        elif value is not None:
            options[name] = settings.parse_value(value) if isinstance(value, str) else value
    return settings.read_criteria(options, config, Path.cwd())


def _parse_severity(text: str) -> tuple[str, str]:
    code, sign, severity = text.partition("=")
    if not sign:
        raise UsageError(
            f"--severity {text}: expected CODE=SEVERITY", hint="For example: --severity LS204=error"
        )
    return code.strip(), severity.strip()


criteria_options = _grouped(
    "criteria",
    _read_criteria,
    click.option(
        "--select", multiple=True, metavar="CODE,...", help="Only these rules: LS201, LS2, ALL."
    ),
    click.option("--ignore", multiple=True, metavar="CODE,...", help="Not these rules."),
    click.option(
        "--severity",
        multiple=True,
        metavar="CODE=SEVERITY",
        help="error, warning, info or undetermined, instead of the rule's own.",
    ),
    click.option(
        "--target",
        multiple=True,
        metavar="RUNTIME",
        help="Say what is known to fail there: onnxruntime, openvino, opencv, tensorrt.",
    ),
    click.option("--min-opset", type=int, help="The lowest opset allowed in an ONNX file."),
    click.option("--max-opset", type=int, help="The highest."),
    click.option(
        "--dynamic",
        metavar="none|batch|any",
        help="Which axes of inputs and outputs may be open. Default: batch.",
    ),
    click.option("--groups", metavar="N|-1|auto", help="The groups that there must be."),
    click.option("--channels-per-group", metavar="N", help="Instead of --groups."),
    click.option("--weights", is_flag=True, help="Look at every weight, outside the file, too."),
    click.option("--reference", metavar="FILE", help="Run it and compare. Default: FILE.ref.npz."),
    click.option(
        "--runtime",
        multiple=True,
        metavar="RUNTIME",
        help="Where: onnxruntime, openvino, opencv, reference, all.",
    ),
    click.option("--max-drift", type=float, help="Largest relative error against the BN model."),
    click.option("--config", metavar="FILE", help="TOML with these fields; options win over it."),
)


def _read_export(no_verify: bool, input_shape: tuple[str, ...], **values: Any) -> dict[str, Any]:
    """The fields of `ExportOptions` that the command line sets."""
    unset = (None, False, ())
    fields = {n: v for n, v in values.items() if not any(v is nothing for nothing in unset)}
    if no_verify:
        fields["verify"] = False
    if input_shape:
        shapes = list(map(_parse_shape, input_shape))
        fields["input_shape"] = dict(shapes)
        if len(shapes) > len(fields["input_shape"]):
            raise UsageError("--input-shape: an input has two shapes")
    return fields


def _parse_shape(text: str) -> tuple[str, list[int | None]]:
    name, _, sizes = text.rpartition("=")
    try:
        return name or "all", [None if s.strip() == "?" else int(s) for s in sizes.split(",")]
    except ValueError:
        raise UsageError(
            f"--input-shape {text}: expected sizes with commas between them, ? where an axis "
            "stays open",
            hint="For example: --input-shape 1,224,224,3 or --input-shape image=?,224,224,3",
        ) from None


export_options = _grouped(
    "export",
    _read_export,
    click.option(
        "--format",
        type=click.Choice(["keras", "h5", "savedmodel", "onnx"]),
        help="Of OUT; by default from its suffix, none meaning SavedModel.",
    ),
    click.option("--opset", type=int, help="Of an ONNX file, 13 to the newest. Default: 18."),
    click.option(
        "--groupnorm",
        metavar="portable|plain|precise|primitive|native",
        help="ONNX operators that GroupNormalization becomes. Default: portable.",
    ),
    click.option(
        "--target",
        "target_runtime",
        metavar="onnxruntime",
        help="Tune the ONNX graph for one runtime.",
    ),
    click.option(
        "--input-shape",
        multiple=True,
        metavar="[NAME=]N,...",
        help="Fix an ONNX input's shape, batch first; ? leaves an axis open.",
    ),
    click.option(
        "--inputs-as-nchw",
        multiple=True,
        metavar="NAME|all",
        help="ONNX inputs of 4 axes that become channels first.",
    ),
    click.option(
        "--outputs-as-nchw",
        multiple=True,
        metavar="NAME|all",
        help="ONNX outputs of 4 axes that become channels first.",
    ),
    click.option("--fp16", is_flag=True, help="ONNX in float16 but for what needs float32."),
    click.option(
        "--external-data",
        metavar="auto|always|never",
        help="Whether an ONNX file's weights go beside it. Default: auto, above 1.9 GB.",
    ),
    click.option(
        "--serving-only", is_flag=True, help="A SavedModel without the Keras part, to serve only."
    ),
    click.option("--no-verify", is_flag=True, help="Don't run what was written."),
    click.option("--keep-failed", is_flag=True, help="Keep what fails, in the folder OUT.failed."),
)


def _read_samples(samples: str | None, **values: Any) -> dict[str, Any]:
    """The arguments of `swap` about samples; `MODULE:NAME` is imported, a path stays one."""
    if samples is None:
        return values
    if not samples:
        raise UsageError("--samples: expected a file, a folder or MODULE:NAME")
    if not os.path.exists(samples) and ":" in samples:
        return {"samples": import_object("--samples", samples), **values}
    return {"samples": samples, **values}


sample_options = _grouped(
    "sampling",
    _read_samples,
    click.option(
        "--samples",
        metavar="FILE|DIR|MODULE:NAME",
        help="Unlabelled inputs to calibrate with: .npy, .npz, a folder of images, or a function "
        "that gives a dataset (imported, so its module's code runs).",
    ),
    click.option(
        "--max-samples", type=int, default=256, show_default=True, help="How many to use at most."
    ),
)

distill_option = click.option(
    "--distill",
    type=int,
    default=0,
    metavar="STEPS",
    help="Also train γ and β on the samples to answer as IN does.",
)


@dataclass(frozen=True, slots=True)
class Loading:
    """How a Keras model is loaded."""

    custom_objects: tuple[str, ...]
    unsafe: bool

    def fields(self) -> dict[str, Any]:
        """What `load` takes; imports what was named."""
        return {"custom_objects": _import(self.custom_objects), "unsafe": self.unsafe}


load_options = _grouped(
    "loading",
    Loading,
    click.option(
        "--custom-objects",
        multiple=True,
        metavar="MODULE:NAME",
        help="A class or function that the model needs; imported, so its module's code runs.",
    ),
    click.option("--unsafe", is_flag=True, help="Run code that the file holds (Lambda layers)."),
)

debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")

report_options = _grouped(
    "output",
    Output,
    click.option(
        "--report-format",
        type=click.Choice(FORMATS),
        default="text",
        show_default=True,
        help="How the report is written: for people, or for what reads it in CI.",
    ),
    click.option("--output-file", metavar="FILE", help="Where the report goes instead of stdout."),
    click.option("--force", is_flag=True, help="Replace existing files."),
    click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
    debug_option,
)


def _import(names: tuple[str, ...]) -> Mapping[str, Any]:
    """The objects that `MODULE:NAME` names, by their last name."""
    return {re.split("[.:]", text)[-1]: import_object("--custom-objects", text) for text in names}


def import_object(option: str, text: str) -> Any:
    """What `MODULE:NAME` names.

    Raises:
        UsageError: it can't be imported; names the option.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise UsageError(f"{option} {text}: expected MODULE:NAME")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(text)
    except Exception as error:  # whatever the user's module raises
        raise UsageError(
            f"{option} {text}: {type(error).__name__}: {error}",
            hint="The module is looked for in the current folder and on PYTHONPATH.",
        ) from error
