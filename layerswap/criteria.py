"""What `check` judges by: which rules, how severe, and the limits they know.

The same fields are the keyword arguments of `check`, the options of its command and the keys of
the table `check` in `layerswap.toml`; all of them are validated here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from layerswap import catalog
from layerswap.errors import UsageError
from layerswap.grouping import auto_groups, nearest_groups
from layerswap.planning import path_matches
from layerswap.policy import Policy, explain
from layerswap.records import Severity
from layerswap.runtimes import ALL, FILE_RUNTIMES

Target = Literal["onnxruntime", "openvino", "opencv", "tensorrt"]
Dynamic = Literal["none", "batch", "any"]
TARGETS: tuple[Target, ...] = get_args(Target)
# Rules that someone must ask for by name: of most files they would say the same.
_OPT_IN = frozenset({"LS711"})
# What the rules need that compare two files.
_DIFF = "layerswap diff"
# Nobody can look away from a file that nobody could look at.
_ALWAYS = frozenset({"LS001"})
_FAILING = ("error", "undetermined")


def _to_words(value: Any) -> Any:
    """One word, several with commas between them, or a list of such."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"must be text or a list of texts, not {value!r}")
    return tuple(word.strip() for part in parts for word in part.split(",") if word.strip())


def _to_codes(value: Any) -> tuple[str, ...]:
    words: tuple[str, ...] = _to_words(value)
    for word in words:
        if not catalog.matching(word):
            raise ValueError(f"holds '{word}', which is not a rule{catalog.suggestion(word)}")
    return words


def _to_severities(value: Any) -> Any:
    if isinstance(value, Mapping):
        _to_codes(list(value))
    return value


def _to_runtimes(value: Any) -> tuple[str, ...]:
    words: tuple[str, ...] = _to_words(value)
    known = (*FILE_RUNTIMES, ALL)
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"must be one of {', '.join(known)}, not {unknown[0]!r}")
    return words


Codes = Annotated[tuple[str, ...], BeforeValidator(_to_codes)]
Severities = Annotated[dict[str, Severity], BeforeValidator(_to_severities)]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    select: Codes = ()
    ignore: Codes = ()
    severity: Severities = Field(default_factory=dict)
    target: Annotated[tuple[Target, ...], BeforeValidator(_to_words)] = ()
    min_opset: Annotated[int, Field(ge=1)] | None = None
    max_opset: Annotated[int, Field(ge=1)] | None = None
    dynamic: Dynamic = "batch"
    weights: StrictBool = False
    runtime: Annotated[tuple[str, ...], BeforeValidator(_to_runtimes)] = ()
    reference: str | None = None
    max_drift: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _possible(self) -> _Fields:
        if self.min_opset and self.max_opset and self.min_opset > self.max_opset:
            raise ValueError(
                f"min_opset {self.min_opset} is above max_opset {self.max_opset}: no file is both"
            )
        for word in self.ignore:
            if catalog.chosen([word]) <= _ALWAYS:
                raise ValueError(f"ignore: {word} can't be ignored, since nothing would be proven")
        for word, severity in self.severity.items():
            if catalog.chosen([word]) <= _ALWAYS and severity not in _FAILING:
                raise ValueError(
                    f"severity: {word} can't be {severity}, since nothing would be proven"
                )
        return self


class FileOverride(_Fields):
    """Other fields for the files whose path matches."""


class Criteria(_Fields):
    """What a file is judged by. Immutable.

    Args:
        select: rules to apply, by code (`LS201`), beginning of one (`LS2`), name or `ALL`; by
            default all but those that must be asked for.
        ignore: rules not to apply, named in the same ways; wins over `select`.
        severity: rule → "error", "warning", "info" or "undetermined"; later entries win.
        target: runtimes that the file shall run in: "onnxruntime", "openvino", "opencv",
            "tensorrt". What is known to fail there is a finding.
        min_opset, max_opset: bounds of an ONNX file's opset, both allowed.
        dynamic: which axes of inputs and outputs may be open: "none", "batch" (the first of
            each) or "any".
        weights: look at every weight, those outside an ONNX file, too.
        runtime: run an ONNX file there on its reference inputs: "onnxruntime", "openvino",
            "opencv", "reference" (onnx's own evaluator), "all" that are installed.
        reference: the reference file; by default the one beside the file.
        max_drift: the largest relative error against the BN model, as the reference has it.
        overrides: glob on the file's path → fields, in order; the first that matches applies.
        policy: what the groups are compared with; None: they aren't.

    Raises:
        UsageError: unknown field, wrong type or value, or no such rule.
    """

    overrides: dict[str, FileOverride] = Field(default_factory=dict)
    policy: Policy | None = None

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise UsageError(explain(error, Criteria.model_fields)) from None

    def for_file(self, path: str) -> Criteria:
        """The criteria with the fields of the first override that matches the path."""
        fields = {name: getattr(self, name) for name in self.model_fields_set - {"overrides"}}
        for pattern, override in self.overrides.items():
            if path_matches(pattern, path):
                fields |= {name: getattr(override, name) for name in override.model_fields_set}
                break
        return Criteria(**fields)

    def applies(self, code: str) -> bool:
        """Whether a rule is to be applied."""
        if code in _ALWAYS:
            return True
        if code in catalog.chosen(self.ignore):
            return False
        if self.select:
            named = [word for word in self.select if word.upper() != "ALL"]
            return code in catalog.chosen(named if code in _OPT_IN else self.select)
        return code not in _OPT_IN

    def covers(self, rule: catalog.Rule, kind: catalog.FileKind) -> bool:
        """Whether a rule can find anything in a file of a kind: it applies and has what it needs.

        Args:
            rule: any of the catalog.
            kind: of the file.
        """
        if kind not in rule.kinds or not self.applies(rule.code):
            return False
        match rule.name:
            case "groups-differ":
                return self.policy is not None
            case "opset-out-of-range":
                return bool(self.min_opset or self.max_opset)
            case "nonfinite-weights" | "zero-weights":
                return self.weights
            case "zero-gamma":
                return self.weights or kind == "onnx"
            case "parity" | "runtime-failed":
                return bool(self.runtime or self.reference)
            case "drift":
                return self.max_drift is not None
        runtime = rule.name.removeprefix("fails-in-")
        if runtime != rule.name:
            return runtime in self.target
        return rule.needs != _DIFF

    def severity_of(self, code: str) -> Severity | None:
        """What the user says of a rule's severity; None where nothing."""
        said = [
            severity
            for word, severity in self.severity.items()
            if code in catalog.chosen([word]) and (code not in _ALWAYS or severity in _FAILING)
        ]
        return said[-1] if said else None

    @property
    def names_layers(self) -> bool:
        """Whether the policy says different things of different layers."""
        policy = self.policy
        return policy is not None and bool(policy.include or policy.exclude or policy.overrides)

    def policy_for(self, path: str) -> Policy | None:
        """The policy of a layer; None where there is none, or it leaves the layer out."""
        if self.policy is None or any(path_matches(p, path) for p in self.policy.exclude):
            return None
        if self.policy.include and not any(path_matches(p, path) for p in self.policy.include):
            return None
        override = next(
            (o for p, o in self.policy.overrides.items() if path_matches(p, path)), None
        )
        return self.policy.applied(override)

    def groups_for(self, path: str, channels: int | None) -> int | None:
        """How many groups the policy gives a layer.

        Args:
            path: the layer's.
            channels: how many it has; None where its file doesn't say.

        Returns:
            None where the policy says nothing of the layer, or its channels would have to be known.
        """
        policy = self.policy_for(path)
        if policy is None:
            return None
        nearest, size = policy.on_indivisible == "nearest", policy.channels_per_group
        if channels is None:
            plain = size is None and not nearest and policy.groups not in ("auto", -1)
            return int(policy.groups) if plain else None
        if size is not None:
            return max(1, channels // (nearest_groups(channels, size) if nearest else size))
        if policy.groups == "auto":
            return auto_groups(channels)
        if policy.groups == -1:
            return channels
        return nearest_groups(channels, policy.groups) if nearest else policy.groups
