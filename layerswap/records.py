"""Every record that travels between the stages: frozen, plain data, JSON both ways.

Records hold no framework object. Those with arrays compare by identity (`eq=False`) and are
not JSON; all others go through `to_json` and `from_json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydantic import ConfigDict

SCHEMA_VERSION = 1
# What the decomposition needs at least, and the newest that tf2onnx writes; `onnx` itself
# converts to newer ones.
LOWEST_OPSET, TRACED_OPSET = 13, 18
# Forms of GroupNormalization in ONNX, and the lowest opset of each.
PROFILE_OPSETS: Mapping[str, int] = {
    "portable": 13,
    "plain": 13,
    "precise": 13,
    "primitive": 13,
    "native": 21,
}

Array = NDArray[Any]
Float64 = NDArray[np.float64]
Severity = Literal["error", "undetermined", "warning", "info"]

# JSON has no infinite numbers; a string stands for one in records with this configuration.
INFINITE: ConfigDict = {"ser_json_inf_nan": "strings"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to say about the model under check.

    Attributes:
        code: stable; a rule's, or kebab-case where there is no rule for it.
        severity: "error" and "undetermined", which is what nobody could decide, fail the command.
        where: a layer path, node or file.
        message: what is so, without a stop at the end.
        hint: the remedy, in sentences; empty where there is none.
        file: the one concerned, in a report on several.
    """

    code: str
    severity: Severity
    where: str
    message: str
    hint: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A fact about a site that rules out a swap whatever the policy says.

    Attributes:
        code: stable and kebab-case.
        reason: the fact, in words.
    """

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Site:
    """One BatchNormalization object of a model, as the walk found it.

    Attributes:
        path: names of the containers and of the layer, joined by `/`; the model's own name is
            left out. Unique within the model.
        class_name: the layer's class.
        config: the layer's configuration as Keras serializes it.
        channels: size of the normalised axis, or None when it isn't known.
        axis: index of the normalised axis, counted from 0 with the batch axis, or None when
            there is not exactly one.
        rank: number of axes of the input, batch included, or None when unbuilt.
        calls: at how many places of the graph the object is called.
        spatial: positions per sample and channel (product of the other axes), or None when
            they aren't fixed. With several calls: the smallest.
        shape: the input's, None where not fixed; with several calls, that of the smallest
            `spatial`. Empty when unbuilt.
        trainable: the layer's own flag.
        consumers_cast: whether all layers that use the output cast it to their own type.
        obstacles: what rules out a swap whatever the policy says.
    """

    path: str
    class_name: str
    config: Mapping[str, Any]
    channels: int | None
    axis: int | None
    rank: int | None
    calls: int = 1
    spatial: int | None = None
    shape: tuple[int | None, ...] = ()
    trainable: bool = True
    consumers_cast: bool = False
    obstacles: tuple[Obstacle, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What a BatchNormalization learned, one float64 value per channel.

    `gamma` is ones and `beta` zeros where the layer has none.
    """

    gamma: Float64
    beta: Float64
    mean: Float64
    variance: Float64

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        arrays = (self.gamma, self.beta, self.mean, self.variance)
        return all(bool(np.isfinite(array).all()) for array in arrays)


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """γ and β for a GroupNormalization, one float64 value per channel."""

    gamma: Float64
    beta: Float64


@dataclass(frozen=True, slots=True)
class Swap:
    """The site becomes a GroupNormalization.

    Attributes:
        site: where, and what is there now.
        config: the new layer's, as Keras deserializes it.
        weights: how γ and β are computed.
        notes: warnings about this swap.
        adaptive_epsilon: whether the policy leaves the epsilon to what was learned or, with
            samples, to what fits best.
        predicted: the share of its output's variance that the layer gets wrong if elements are
            independent (see `moments.predicted_error`); None where that can't be said.
        kind: which decision this is.
    """

    site: Site
    config: Mapping[str, Any]
    weights: Literal["match", "copy", "reset"]
    notes: tuple[Finding, ...] = ()
    adaptive_epsilon: bool = False
    predicted: float | None = None
    kind: Literal["swap"] = "swap"

    @property
    def channels(self) -> int:
        """Size of the normalised axis."""
        size = self.site.shape[self.config["axis"]] if self.site.shape else self.site.channels
        assert size is not None
        return size

    @property
    def groups(self) -> int:
        """Number of groups, always positive."""
        return int(self.config["groups"])

    @property
    def channels_per_group(self) -> int:
        """Channels that share one mean and variance."""
        return self.channels // self.groups

    @property
    def elements_per_group(self) -> int | None:
        """Elements per sample behind one mean and variance; None when not fixed."""
        if self.site.spatial is None or self.site.channels is None:
            return None
        return self.site.channels * self.site.spatial // self.groups


@dataclass(frozen=True, slots=True)
class Skip:
    """The site stays BatchNormalization because the user said so.

    Attributes:
        site: where.
        reason: what the user said.
        kind: which decision this is.
    """

    site: Site
    reason: str
    kind: Literal["skip"] = "skip"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The site can't be swapped under this policy.

    Attributes:
        site: where.
        code: stable and kebab-case.
        reason: why, with the numbers.
        hint: the remedy; empty where there is none.
        kind: which decision this is.
    """

    site: Site
    code: str
    reason: str
    hint: str = ""
    kind: Literal["refusal"] = "refusal"


Decision = Swap | Skip | Refusal


@dataclass(frozen=True, slots=True)
class SwapPlan:
    """Every BatchNormalization of a model with its decision; nothing is changed yet.

    Attributes:
        source: the file that the model was read from, or the model's name.
        policy: the policy's fields as plain data.
        decisions: one per site, in the order of the walk.
        findings: warnings about the model or about what the swap will mean.
        schema: the version of this form; another one where a field went or means something else.
    """

    source: str
    policy: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    findings: tuple[Finding, ...] = ()
    schema: int = SCHEMA_VERSION

    @property
    def swaps(self) -> tuple[Swap, ...]:
        """The sites that become GroupNormalization."""
        return tuple(d for d in self.decisions if isinstance(d, Swap))

    @property
    def skips(self) -> tuple[Skip, ...]:
        """The sites that stay because the user said so."""
        return tuple(d for d in self.decisions if isinstance(d, Skip))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The sites that can't be swapped under this policy."""
        return tuple(d for d in self.decisions if isinstance(d, Refusal))

    @property
    def notes(self) -> tuple[Finding, ...]:
        """All findings: those of the model and those of each swap."""
        return (*self.findings, *(note for swap in self.swaps for note in swap.notes))

    @property
    def ok(self) -> bool:
        """Whether nothing was refused."""
        return not self.refusals

    def to_json(self) -> str:
        """The plan as indented JSON, keys in the order of the fields."""
        return to_json(self)


@dataclass(frozen=True, slots=True)
class TransferLog:
    """Accounts for every variable of the converted model, by path (`layer/variable`).

    `copied` variables hold the source's bits; `fitted` were computed from the source's
    BatchNormalization; `fresh` hold what their initializer gave.
    """

    copied: tuple[str, ...]
    fitted: tuple[str, ...]
    fresh: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Two arrays agree where |a − b| ≤ absolute + relative · max|b|, with b the expected one.

    The relative part is taken of the output's largest magnitude, not element by element: a
    float32 runtime rounds sums of large terms, also where they cancel.

    Attributes:
        absolute: in the units of the output.
        relative: a share of the output's largest magnitude.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    absolute: float
    relative: float


@dataclass(frozen=True, slots=True)
class Parity:
    """How near a runtime comes to the GN Keras model (rounding only).

    Attributes:
        runtime: what ran the file.
        max_absolute: the largest |a − b|.
        max_relative: that over max|b|.
        tolerance: what was tolerated.
        batches: the batch sizes compared.
        ok: whether all is within tolerance.
        worst_output: the output furthest from it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    runtime: str
    max_absolute: float
    max_relative: float
    tolerance: Tolerance
    batches: tuple[int, ...]
    ok: bool
    worst_output: str = ""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the GN model is from the BN model (not zero: GN uses per-sample statistics).

    Attributes:
        relative_error: ‖GN − BN‖ / ‖BN‖ over all outputs.
        argmax_agreement: the share of samples with the same arg-max; None where no output is a
            score vector.
        samples: how many were compared.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    relative_error: float
    argmax_agreement: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another number of groups for a layer.

    Attributes:
        groups: how many.
        error: of the best fit with it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    groups: int
    error: float


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How well a GroupNormalization does what the BatchNormalization did, on samples.

    Errors are shares: mean of (GN − BN)² over the layer's outputs on held-out samples, divided by
    the variance of BN's.

    Attributes:
        path: the layer's.
        groups, epsilon: of the GroupNormalization.
        fit: what was kept: "match", the data-free fit, or "calibrated".
        error_match: the data-free fit's error.
        error: that of what was kept.
        spread: how much the variance of a group differs between samples: standard deviation by
            mean, averaged over groups.
        source_mean: of BN's normalised values on the samples, root mean square over channels; 0
            where the moving mean fits the samples.
        source_variance: of the same, median over channels; 1 where the moving variance fits.
        note: why a fit was not considered, if so.
        predicted: the error that was to be expected without samples; see `Swap`.
        alternatives: what other numbers of groups would do, where that was asked for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    path: str
    groups: int
    epsilon: float
    fit: Literal["match", "calibrated"]
    error_match: float
    error: float
    spread: float
    source_mean: float
    source_variance: float
    note: str = ""
    predicted: float | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration and distillation did, measured on held-out samples.

    Errors are those of the model's outputs: Σ(GN − BN)² / Σ(BN − mean)², averaged over outputs,
    probabilities compared as logits.

    Attributes:
        samples, held_out: how many were fitted to, and how many judged.
        layers: in the order in which they are called.
        kept: whether the calibrated model was better than the data-free one; if not, that is
            what there is.
        error_match, drift_match: the data-free model's.
        error_calibrated: the calibrated model's, kept or not.
        error, drift: of the model as it is now.
        distilled: steps of distillation up to the state that was kept; None without.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    samples: int
    held_out: int
    layers: tuple[LayerFit, ...]
    kept: bool
    error_match: float
    error_calibrated: float
    error: float
    drift_match: Drift | None
    drift: Drift | None
    distilled: int | None = None


@dataclass(frozen=True, slots=True)
class LayerAdvice:
    """What to do with a BatchNormalization.

    Attributes:
        path, channels: the layer's.
        groups: how many to take; None: leave it as it is, frozen.
        error: the expected share of its output's variance that is wrong with it; None where that
            isn't known.
        reason: why.
        alternatives: other numbers of groups.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    path: str
    channels: int | None
    groups: int | None
    error: float | None
    reason: str
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Advice:
    """Whether to swap a model, and how.

    Attributes:
        verdict: "swap" it, "distill" it as well, or "keep" its BatchNormalization, frozen.
        reason: why, with the numbers.
        layers: one for each BatchNormalization, in the order of the walk.
        policy: the fields of a policy that do what is advised.
        measured: whether samples were there; else all is predicted from the statistics.
    """

    verdict: Literal["swap", "distill", "keep"]
    reason: str
    layers: tuple[LayerAdvice, ...]
    policy: Mapping[str, Any]
    measured: bool


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder that was written.

    Attributes:
        path: where it is.
        format: what it is.
        bytes: of all files but the reference.
        opset: of an ONNX file.
        sha256: of the file at `path`; None for a folder.
        reference: the file beside it with inputs and Keras's answers, if any.
        parity: how near it comes to the Keras model, where it was run.
        drift: from the BN model, where there was one.
        findings: what there is to know about it.
    """

    path: str
    format: Literal["keras", "h5", "savedmodel", "onnx"]
    bytes: int
    opset: int | None = None
    sha256: str | None = None
    reference: str | None = None
    parity: Parity | None = None
    drift: Drift | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A normalization layer, or an operator of a graph, and where it is.

    Whatever the file doesn't say is None, or empty.

    Attributes:
        path: the layer's, or the node's.
        class_name: the layer's class, or the operator.
        module: of the class, or the domain of the operator.
        parents: the classes of what holds it, the model first.
        channels, groups, elements, epsilon: of a GroupNormalization, however it is spelled;
            `elements` are those of a group in one sample.
        dtype: what it computes in.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    path: str
    class_name: str
    module: str
    parents: tuple[str, ...]
    channels: int | None = None
    groups: int | None = None
    elements: int | None = None
    epsilon: float | None = None
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """One file that `check` looked at.

    Attributes:
        source: the file.
        examined: how many layers or nodes it has.
        layers: those that normalize.
        rules: the codes of the rules that were applied to it.
    """

    source: str
    examined: int
    layers: tuple[LayerRecord, ...] = ()
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two files differ.

    Attributes:
        code: a rule's, LS901 and up.
        where: the layer, node, tensor, input or field concerned.
        message: what differs, in words.
        before, after: the first's and the second's, as text; None where it has none.
        norms: of weights: `before` and `after`, their Euclidean norms; `difference`, that of the
            difference; `relative`, that over the first's; `largest`, the largest absolute
            difference.
    """

    __pydantic_config__: ClassVar[ConfigDict] = INFINITE

    code: str
    where: str
    message: str
    before: str | None = None
    after: str | None = None
    norms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What a command found and did; `ok` and `exit_code` follow from it.

    Attributes:
        command: its name.
        source: the file that it was given, or the model's name; several with commas between.
        plan: what becomes of each BatchNormalization.
        transfer: what became of each variable.
        artifact: what was written.
        parity: how near each runtime comes to the Keras model.
        drift: how far the GN model is from the BN model.
        calibration: what samples brought.
        advice: whether to swap, and how.
        findings: what there is to say.
        seconds: stage → how long it took.
        checked: the files that were looked at.
        differences: in what two files differ.
        schema: the version of this form; another one where a field went or means something else.
    """

    command: str
    source: str
    plan: SwapPlan | None = None
    transfer: TransferLog | None = None
    artifact: Artifact | None = None
    parity: tuple[Parity, ...] = ()
    drift: Drift | None = None
    calibration: Calibration | None = None
    advice: Advice | None = None
    findings: tuple[Finding, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    checked: tuple[Checked, ...] = ()
    differences: tuple[Difference, ...] = ()
    schema: int = SCHEMA_VERSION

    @property
    def undetermined(self) -> bool:
        """Whether something could not be decided."""
        return any(f.severity == "undetermined" for f in self.findings)

    @property
    def ok(self) -> bool:
        """No refusal, no error finding, no parity beyond tolerance, nothing undetermined."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """1 where something is wrong, else 3 where something is undetermined, else 0."""
        right = (
            (self.plan is None or self.plan.ok)
            and all(p.ok for p in self.parity)
            and all(f.severity != "error" for f in self.findings)
        )
        return 1 if not right else 3 if self.undetermined else 0

    def to_json(self) -> str:
        """The report as indented JSON."""
        return to_json(self)


_R = TypeVar("_R")

_adapters: dict[type, Any] = {}


def _adapter(record: type) -> Any:
    if record not in _adapters:
        from pydantic import TypeAdapter  # takes longer to import than everything else here

        _adapters[record] = TypeAdapter(record)
    return _adapters[record]


def to_json(record: Any) -> str:
    """Any record without arrays as indented JSON."""
    from pydantic_core import PydanticSerializationError

    adapter = _adapter(type(record))
    try:
        text: bytes = adapter.dump_json(record, indent=2)
    except PydanticSerializationError:  # a file's name needs not be text
        text = adapter.dump_json(_encodable(record), indent=2)
    return text.decode()


def encodable(text: str) -> str:
    """The text with an escape for whatever no encoding has: bytes of a file's name."""
    return text.encode("utf-8", "backslashreplace").decode()


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_encodable, value))
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: _encodable(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **own)
    return value


def from_json(record: type[_R], text: str | bytes) -> _R:
    """Reads back what `to_json` wrote.

    Raises:
        ValueError: the text isn't JSON or doesn't have the record's fields.
    """
    result: _R = _adapter(record).validate_json(text)
    return result
