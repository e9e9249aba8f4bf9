"""What the user wants of the swap: one validated, immutable set of fields.

The same fields are the keyword arguments of `plan`, `swap` and `convert`, the options of the
command line and the keys of `layerswap.toml`; all of them are validated here and nowhere else.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from layerswap.errors import PolicyError


def _to_plain(value: Any) -> Any:
    """What Keras accepts (name, config dict, object, None) as plain data.

    A Keras object says its configuration itself; a class that isn't Keras's own is named with
    its module, from which Keras imports it again.
    """
    if value is None:
        return "none"
    if isinstance(value, str | dict):
        return value
    get_config = getattr(value, "get_config", None)
    if not callable(get_config) or isinstance(value, type):
        raise ValueError(f"must be a Keras name, a config dict or a Keras object, not {value!r}")
    kind = type(value)
    plain = {"class_name": kind.__qualname__, "config": _jsonable(get_config())}
    if not kind.__module__.startswith(("tf_keras.", "keras.")):
        plain |= {"module": kind.__module__, "registered_name": None}
    return plain


def _jsonable(value: Any) -> Any:
    """A configuration without NumPy's arrays and scalars, which JSON doesn't know."""
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


def _to_switch(value: Any) -> Any:
    if value is True or value is False or value == "carry":
        return value
    raise ValueError(f"must be true, false or 'carry', not {value!r}")


def _to_axis(value: Any) -> Any:
    if value == "carry" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ValueError(f"must be an integer or 'carry', not {value!r}")


def _to_patterns(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _to_groups(value: Any) -> Any:
    """Strict: a bool is not a number of groups and 3.0 is not 3."""
    if isinstance(value, str) and value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or (value < 1 and value != -1):
        raise ValueError(
            f"must be a positive integer, -1 (one group per channel) or 'auto', not {value!r}"
        )
    return int(value)


def _to_epsilon(value: Any) -> Any:
    if isinstance(value, str) and value in ("carry", "adaptive"):
        return value
    if isinstance(value, bool) or not isinstance(value, Real) or not TINY <= float(value) <= HUGE:
        raise ValueError(
            f"must be a positive number that float32 holds, 'carry' or 'adaptive', not {value!r}"
        )
    return float(value)


def _to_factor(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= HUGE:
        raise ValueError(f"must be a positive number, not {value!r}")
    return float(value)


def _to_size(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"must be a positive integer, not {value!r}")
    return int(value)


# The normal numbers of float32, in which the layer computes.
TINY, HUGE = 1.1754944e-38, 3.4028235e38

Groups = Annotated[int | Literal["auto"], BeforeValidator(_to_groups)]
Epsilon = Annotated[float | Literal["carry", "adaptive"], BeforeValidator(_to_epsilon)]
# "carry" (what the BatchNormalization had), "none", a Keras name, or a serialized config.
Part = Annotated[str | dict[str, Any], BeforeValidator(_to_plain)]
Switch = Annotated[bool | Literal["carry"], BeforeValidator(_to_switch)]
Axis = Annotated[int | Literal["carry"], BeforeValidator(_to_axis)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_to_patterns)]
Weights = Literal["match", "copy", "reset"]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Override(_Fields):
    """Fields of the policy for the layers whose path matches; None leaves a field as it is."""

    groups: Groups | None = None
    channels_per_group: Annotated[int | None, BeforeValidator(_to_size)] = None
    allow_degenerate: StrictBool | None = None
    on_indivisible: Literal["error", "nearest", "skip"] | None = None
    epsilon: Epsilon | None = None
    adaptive_k: Annotated[float, BeforeValidator(_to_factor)] | None = None
    axis: Axis | None = None
    center: Switch | None = None
    scale: Switch | None = None
    beta_initializer: Part | None = None
    gamma_initializer: Part | None = None
    beta_regularizer: Part | None = None
    gamma_regularizer: Part | None = None
    beta_constraint: Part | None = None
    gamma_constraint: Part | None = None
    weights: Weights | None = None

    @model_validator(mode="before")
    @classmethod
    def _keep_explicit_none(cls, data: Any) -> Any:
        # In an override, too, None for a regularizer or constraint means "remove it".
        return _none_removes(data)

    @model_validator(mode="after")
    def _one_way_to_size(self) -> Override:
        if self.groups is not None and self.channels_per_group is not None:
            raise ValueError("groups and channels_per_group exclude each other")
        return self


class Policy(_Fields):
    """What every BatchNormalization shall become. Immutable.

    Args:
        groups: a positive integer (strict), -1 (one group per channel) or "auto": the largest
            divisor of C that is at most 32 and leaves at least 16 channels per group, else 1.
        channels_per_group: instead of `groups`.
        allow_degenerate: accept groups that hold a single element per sample; such a layer puts
            out β whatever its input.
        on_indivisible: what to do where C doesn't divide by the groups: "error" refuses, "nearest"
            takes the largest legal number of groups that isn't above, "skip" leaves the layer.
        epsilon: a positive number, "carry" (BatchNormalization's) or "adaptive": max(1e-3,
            `adaptive_k` · mean group variance). None: adaptive with weights="match", else carry.
        adaptive_k: the factor of the adaptive epsilon.
        axis: "carry", or the index of BatchNormalization's own axis; another axis only with
            weights="reset".
        center, scale: a bool or "carry". Matching needs both and turns them on.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint,
            gamma_constraint: "carry", or what Keras accepts: a name, a config dict, an object;
            None or "none" removes a regularizer or constraint.
        include, exclude: globs on the layer path: `*` stops at `/`, `**` doesn't; case-sensitive;
            exclude wins; a pattern that matches nothing is an error.
        overrides: pattern → fields, in order; the first that matches a path applies.
        weights: "match" computes γ and β from what BatchNormalization learned, "copy" takes its γ
            and β as they are, "reset" takes the initializers' values.

    Raises:
        PolicyError: unknown field, wrong type, out of range, or fields that exclude each other.
    """

    groups: Groups = "auto"
    channels_per_group: Annotated[int | None, BeforeValidator(_to_size)] = None
    allow_degenerate: StrictBool = False
    on_indivisible: Literal["error", "nearest", "skip"] = "error"
    epsilon: Epsilon | None = None
    adaptive_k: Annotated[float, BeforeValidator(_to_factor)] = 10.0
    axis: Axis = "carry"
    center: Switch = "carry"
    scale: Switch = "carry"
    beta_initializer: Part = "carry"
    gamma_initializer: Part = "carry"
    beta_regularizer: Part = "carry"
    gamma_regularizer: Part = "carry"
    beta_constraint: Part = "carry"
    gamma_constraint: Part = "carry"
    include: Patterns = ()
    exclude: Patterns = ()
    overrides: dict[str, Override] = Field(default_factory=dict)
    weights: Weights = "match"

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise PolicyError(explain(error, Policy.model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _none_removes_parts(cls, data: Any) -> Any:
        return _none_removes(data)

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if self.channels_per_group is not None and "groups" in self.model_fields_set:
            raise ValueError("groups and channels_per_group exclude each other")
        if self.weights == "match" and (self.center is False or self.scale is False):
            raise ValueError(
                "weights='match' needs both center and scale, since the fit puts the statistics "
                "into γ and β; use weights='copy' or 'reset', or leave center and scale alone"
            )
        return self

    @property
    def epsilon_rule(self) -> float | Literal["carry", "adaptive"]:
        """`epsilon`, with its default resolved."""
        if self.epsilon is not None:
            return self.epsilon
        return "adaptive" if self.weights == "match" else "carry"

    def to_plain(self) -> dict[str, Any]:
        """The fields as JSON-compatible data, for plans and reports."""
        fields = self.model_dump(exclude_none=True)
        if self.channels_per_group is not None:
            del fields["groups"]  # each excludes the other
        plain: dict[str, Any] = json.loads(json.dumps(fields, default=repr))
        return plain

    def applied(self, override: Override | None) -> Policy:
        """The policy with the fields that `override` sets."""
        if override is None:
            return self
        changed = {name: getattr(override, name) for name in override.model_fields_set}
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        # One way to size: the override's replaces the policy's.
        if changed.get("groups") is not None:
            fields.pop("channels_per_group", None)
        if changed.get("channels_per_group") is not None:
            fields.pop("groups", None)
        return Policy(**{**fields, **{k: v for k, v in changed.items() if v is not None}})


PARTS = tuple(
    f"{variable}_{kind}"
    for kind in ("initializer", "regularizer", "constraint")
    for variable in ("beta", "gamma")
)


def _none_removes(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    return {key: "none" if value is None and key in PARTS else value for key, value in data.items()}


def explain(error: ValidationError, fields: Iterable[str]) -> str:
    """One message for all that pydantic found, with a suggestion for unknown names."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"] if not isinstance(part, int)]
        # Unions add the member's name to the location; it says nothing to a user.
        name = ".".join(part for part in location if not part.startswith(("function-", "literal[")))
        if problem["type"] == "extra_forbidden":
            known = list(Override.model_fields if "overrides" in location else fields)
            close = difflib.get_close_matches(location[-1], known, n=1)
            suggestion = f"; did you mean '{close[0]}'?" if close else ""
            lines.append(f"unknown field '{name}'{suggestion}")
        else:
            text = problem["msg"].removeprefix("Value error, ").replace("Input should", "must")
            got = "" if "not " in text else f", not {problem['input']!r}"
            lines.append(f"{name} {text}{got}" if name else text)
    return "; ".join(dict.fromkeys(lines))
