"""What `check` and `diff` look for: every rule by its stable code.

The hundreds digit says what a rule is about: 0 what can't be seen, 1 BatchNormalization,
2 groups, 3 operators, 4 runtimes, 5 numbers, 6 weights, 7 files, 8 proof, 9 differences. A code is
never given to another rule, and one that goes is not used again.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from layerswap.errors import UsageError
from layerswap.records import Finding, Severity

FileKind = Literal["keras", "onnx"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing to look for.

    Attributes:
        code: stable, never used again for another rule.
        name: the same in words, kebab-case; taken wherever the code is.
        severity: of a finding, where neither the rule nor the user says otherwise.
        summary: what a finding means, as the end of "a file in which ...".
        why: what goes wrong with such a file.
        remedy: what to do about it.
        kinds: what it looks at: Keras files (SavedModel folders, too), ONNX files.
        needs: what must be asked for, since it is off without; empty where it always runs.
        sources: where what it claims can be read.
    """

    code: str
    name: str
    severity: Severity
    summary: str
    why: str
    remedy: str
    kinds: tuple[FileKind, ...] = ("keras", "onnx")
    needs: str = ""
    sources: tuple[str, ...] = ()

    def finding(
        self, where: str, message: str, hint: str = "", severity: Severity | None = None
    ) -> Finding:
        """What to say about one place; `hint` and `severity` instead of the rule's own."""
        return Finding(self.code, severity or self.severity, where, message, hint or self.remedy)


def find(text: str) -> Rule:
    """The rule of a code or name.

    Raises:
        UsageError: there is none; suggests the nearest.
    """
    for rule in RULES:
        if text.upper() == rule.code or text == rule.name:
            return rule
    raise UsageError(f"there is no rule '{text}'{suggestion(text)}", hint=_HINT)


def chosen(texts: Iterable[str]) -> frozenset[str]:
    """The codes that a selection names; see `matching`."""
    return frozenset(code for text in texts for code in matching(text))


def matching(text: str) -> tuple[str, ...]:
    """The codes that a code, the beginning of one (`LS2`), a name or `ALL` stands for."""
    upper = text.upper() or "nothing"
    return tuple(
        rule.code
        for rule in RULES
        if upper == "ALL" or rule.code.startswith(upper) or text == rule.name
    )


def suggestion(text: str) -> str:
    """The nearest code or name, as the end of a message; empty where none is near."""
    names = {word.lower(): word for rule in RULES for word in (rule.code, rule.name)}
    close = difflib.get_close_matches(text.lower(), names, n=len(names))
    # Of those that are near, one that begins alike: LS1O1 is LS101 rather than LS711.
    alike = [word for word in close if word[:3] == text[:3].lower()] or close
    return f"; did you mean '{names[alike[0]]}'?" if alike else ""


_HINT = "`layerswap rule` lists them all."

RULES: tuple[Rule, ...] = (
    Rule(
        "LS001",
        "unreadable",
        "undetermined",
        "the file can't be read as a model",
        "Nobody knows what is in it, so nothing is proven.",
        "Copy or export it again.",
    ),
    Rule(
        "LS002",
        "custom-class",
        "undetermined",
        "a class or function outside tf_keras is named",
        "The file holds its name alone; it may hold or do anything.",
        "Load the model: --load, with --custom-objects for classes of your own and --unsafe for "
        "code in a file that you trust (load=True in Python).",
        ("keras",),
    ),
    Rule(
        "LS003",
        "custom-code",
        "undetermined",
        "the file carries code, or calls a TensorFlow function that may do anything",
        "Code isn't run to see what it does.",
        "Load the model: --load, with --custom-objects for classes of your own and --unsafe for "
        "code in a file that you trust (load=True in Python).",
        ("keras",),
    ),
    Rule(
        "LS004",
        "custom-operator",
        "undetermined",
        "an operator belongs to a domain that isn't public, or carries code or a compiled graph",
        "Only its own runtime knows what it computes; it may normalise by batch.",
        "Export it as standard operators, or ignore this rule if you know the operator.",
        ("onnx",),
    ),
    Rule(
        "LS101",
        "batchnorm-left",
        "error",
        "a BatchNormalization is left",
        "Its statistics are those of whole batches: wrong at batch sizes of 1 to 8, and not "
        "allowed in differentially private training.",
        "layerswap plan shows whether it can be swapped, layerswap convert swaps it.",
    ),
    Rule(
        "LS102",
        "batchnorm-op",
        "error",
        "a TensorFlow function is called that normalises by batch",
        "It is BatchNormalization without a layer, so nothing can swap it.",
        "Replace the call in the model's code.",
        ("keras",),
    ),
    Rule(
        "LS103",
        "batchnorm-lookalike",
        "undetermined",
        "something is named like BatchNormalization, keeps statistics or divides as it does",
        "Whether it normalises by batch can't be told from outside: the first axis of a tensor "
        "needs not be the batch.",
        "Look at its code; ignore this rule if it doesn't.",
    ),
    Rule(
        "LS104",
        "stray-affine",
        "warning",
        "a BatchNormalization operator with mean 0, variance 1 and epsilon 0 stands alone",
        "It only multiplies by γ and adds β, as behind the InstanceNormalization of a decomposed "
        "GroupNormalization. Anywhere else it may be what a tool made of a BatchNormalization "
        "that was never trained.",
        "Find out where it comes from; Mul and Add say the same without the name.",
        ("onnx",),
    ),
    Rule(
        "LS201",
        "indivisible-groups",
        "error",
        "the channels of a GroupNormalization don't divide by its groups",
        "Runtimes fail, or put channels into the wrong groups.",
        "Convert with a legal number of groups, or groups='auto'.",
    ),
    Rule(
        "LS202",
        "groups-differ",
        "error",
        "a GroupNormalization has other groups than the policy says",
        "The model isn't the one that was decided on.",
        "Convert again with this policy, or correct the policy.",
        needs="a number of groups: --groups, --channels-per-group or a configuration file",
    ),
    Rule(
        "LS203",
        "degenerate-groups",
        "error",
        "the groups of a GroupNormalization hold one element per sample",
        "Each element is its own mean, so the output is β whatever the input.",
        "Convert with fewer groups.",
        sources=("https://github.com/pytorch/opacus/issues/567",),
    ),
    Rule(
        "LS204",
        "tiny-groups",
        "warning",
        "the groups of a GroupNormalization hold few elements per sample",
        "Mean and variance of a handful of values are mostly noise.",
        "Convert with fewer groups.",
    ),
    Rule(
        "LS301",
        "invalid-graph",
        "error",
        "onnx's own checker refuses the graph",
        "A runtime may refuse it, too, or read it in its own way.",
        "Export it again; the message is the checker's.",
        ("onnx",),
    ),
    Rule(
        "LS302",
        "unknown-operator",
        "error",
        "a standard domain has no such operator in the opset of the file",
        "No runtime has to know it.",
        "Export it again with the opset that has it.",
        ("onnx",),
        sources=("https://onnx.ai/onnx/operators/",),
    ),
    Rule(
        "LS303",
        "deprecated-operator",
        "error",
        "an operator is deprecated in the opset of the file",
        "Runtimes drop it, and some never had it. GroupNormalization of opset 18 to 20 has one γ "
        "for each group instead of each channel.",
        "Export it again with operators of the present.",
        ("onnx",),
        sources=("https://onnx.ai/onnx/operators/",),
    ),
    Rule(
        "LS304",
        "vendor-operator",
        "warning",
        "an operator belongs to a runtime's own domain",
        "Other runtimes don't have it.",
        "Export standard operators, unless the file is for this runtime alone.",
        ("onnx",),
        sources=("https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md",),
    ),
    Rule(
        "LS305",
        "opset-out-of-range",
        "error",
        "the opset is outside the allowed range",
        "What runs the file may be older or newer than it.",
        "Export it again: layerswap export --opset.",
        ("onnx",),
        needs="--min-opset or --max-opset",
    ),
    *(
        Rule(
            code,
            f"fails-in-{target}",
            "error",
            f"{title} is known to fail on an operator or form",
            "It refuses the file, or answers something else than it should.",
            "See the message, and docs/targets.md for all that is known.",
            ("onnx",),
            needs=f"--target {target}",
        )
        for code, target, title in (
            ("LS401", "onnxruntime", "ONNX Runtime"),
            ("LS402", "openvino", "OpenVINO"),
            ("LS403", "opencv", "OpenCV"),
            ("LS404", "tensorrt", "TensorRT"),
        )
    ),
    Rule(
        "LS501",
        "unsafe-variance",
        "warning",
        "a variance is computed as mean(x²) − mean(x)²",
        "Where the mean is large against the standard deviation both terms are nearly the same, "
        "and float32 keeps nothing of their difference: the result is wrong or NaN.",
        "Export it with layerswap, which takes the mean off first.",
        ("onnx",),
        sources=(
            "https://onnx.ai/onnx/operators/onnx__GroupNormalization.html",
            "https://onnx.ai/onnx/operators/onnx__MeanVarianceNormalization.html",
        ),
    ),
    Rule(
        "LS502",
        "missing-epsilon",
        "warning",
        "a normalization divides without an epsilon",
        "A constant input has the variance 0, and 0/0 is NaN.",
        "Set epsilon, 1e-3 for example.",
    ),
    Rule(
        "LS503",
        "small-epsilon",
        "warning",
        "float16 rounds an epsilon to zero",
        "Numbers up to 2^-25 (3e-8) become 0 in float16, and a constant input NaN.",
        "Take an epsilon of 1e-6 or above, or keep the layer in float32.",
        sources=("https://en.wikipedia.org/wiki/Half-precision_floating-point_format",),
    ),
    Rule(
        "LS601",
        "nonfinite-weights",
        "error",
        "a weight holds NaN or infinity",
        "All that depends on it is NaN.",
        "Train or convert again; the source model may hold them already.",
        needs="--weights",
    ),
    Rule(
        "LS602",
        "zero-weights",
        "warning",
        "a kernel is all zero",
        "What it computes doesn't depend on its input. Weights get lost like this on the way.",
        "Compare with the model that the file was made of.",
        needs="--weights",
    ),
    Rule(
        "LS603",
        "zero-gamma",
        "warning",
        "the γ of a normalization is all zero",
        "Its output is β whatever the input.",
        "Compare with the model that the file was made of.",
        needs="--weights in Keras files and where the weights are outside the file",
    ),
    Rule(
        "LS701",
        "dynamic-dimensions",
        "warning",
        "an axis of an input or output is open that wasn't meant to be",
        "Runtimes plan memory and choose kernels for sizes that they know; some can't do without.",
        "Export with --input-shape, or allow it: --dynamic any.",
        ("onnx",),
    ),
    Rule(
        "LS702",
        "external-data-missing",
        "error",
        "the file with the weights is missing",
        "The model can't be loaded.",
        "Copy it along with the .onnx file.",
        ("onnx",),
    ),
    Rule(
        "LS703",
        "external-data-size",
        "error",
        "a weight doesn't fit into the file that should hold it",
        "The file was cut off, or belongs to another model.",
        "Copy both files again, together.",
        ("onnx",),
    ),
    Rule(
        "LS704",
        "external-data-outside",
        "error",
        "a weight is read from outside the model's folder",
        "A file from elsewhere could have any file of this machine read.",
        "Don't load it unless you know where it comes from.",
        ("onnx",),
        sources=("https://onnx.ai/onnx/repo-docs/ExternalData.html",),
    ),
    Rule(
        "LS711",
        "metadata-missing",
        "error",
        "there is no note of which Keras model the file was made of",
        "Its origin can't be proven.",
        "Export it with layerswap, and let no other tool rewrite it.",
        ("onnx",),
        needs="--select LS711",
    ),
    Rule(
        "LS712",
        "metadata-stale",
        "error",
        "the graph isn't the one that its metadata describe",
        "Something changed it after the export.",
        "Export it again.",
        ("onnx",),
    ),
    Rule(
        "LS713",
        "checksum-mismatch",
        "error",
        "the reference beside the file was made for another one",
        "What it proves isn't about this file.",
        "Export again, or give the reference that belongs to it.",
        ("onnx",),
        needs="--weights where the weights are outside the file",
    ),
    Rule(
        "LS801",
        "parity",
        "error",
        "a runtime doesn't reproduce the Keras model",
        "The file isn't the model, at least there.",
        "Export it again; layerswap verify shows the numbers for each runtime.",
        ("onnx",),
        needs="--reference or --runtime",
    ),
    Rule(
        "LS802",
        "drift",
        "error",
        "the model is further from its BN model than the budget allows",
        "GroupNormalization has statistics of its own for each sample, and never answers quite as "
        "BatchNormalization did. How far is acceptable is for you to say.",
        "Calibrate with samples: layerswap convert --samples.",
        ("onnx",),
        needs="--max-drift",
    ),
    Rule(
        "LS803",
        "runtime-failed",
        "error",
        "a runtime can't run the file",
        "It won't run where it is meant to.",
        "See the message; --target names what is known of a runtime.",
        ("onnx",),
        needs="--reference or --runtime",
    ),
    *(
        Rule(
            code,
            name,
            "info",
            summary,
            "A difference is no fault; --exit-code makes one of it.",
            "Nothing, if it was meant.",
            needs="layerswap diff",
        )
        for code, name, summary in (
            ("LS901", "swapped", "a BatchNormalization became a GroupNormalization"),
            ("LS902", "added", "a layer, operator or input is only in the second"),
            ("LS903", "removed", "a layer, operator or input is only in the first"),
            ("LS904", "changed", "a layer, operator or policy has other settings"),
            ("LS905", "interface-changed", "an input or output has another name, type or shape"),
            ("LS906", "weights-changed", "weights differ"),
            ("LS907", "opset-changed", "the operators are those of another opset"),
            ("LS908", "decision-changed", "a plan decides otherwise"),
            ("LS909", "metadata-changed", "the metadata differ"),
            ("LS910", "not-compared", "something could not be compared"),
        )
    ),
)

BY_CODE: Mapping[str, Rule] = {rule.code: rule for rule in RULES}
