"""Swap BatchNormalization for GroupNormalization in trained tf_keras models.

The names below are imported from their modules on first use, so that `import layerswap` is
instant and loads neither TensorFlow nor ONNX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerswap.conversion import advise as advise
    from layerswap.conversion import convert as convert
    from layerswap.criteria import Criteria as Criteria
    from layerswap.differing import diff as diff
    from layerswap.errors import LayerswapError as LayerswapError
    from layerswap.exporting import Converted as Converted
    from layerswap.exporting import export as export
    from layerswap.linting import check as check
    from layerswap.policy import Policy as Policy
    from layerswap.records import Report as Report
    from layerswap.swapping import calibrate as calibrate
    from layerswap.swapping import load as load
    from layerswap.swapping import plan as plan
    from layerswap.swapping import swap as swap
    from layerswap.verifying import verify as verify

_HOMES = {
    "Converted": "layerswap.exporting",
    "Criteria": "layerswap.criteria",
    "LayerswapError": "layerswap.errors",
    "Policy": "layerswap.policy",
    "Report": "layerswap.records",
    "advise": "layerswap.conversion",
    "calibrate": "layerswap.swapping",
    "check": "layerswap.linting",
    "convert": "layerswap.conversion",
    "diff": "layerswap.differing",
    "export": "layerswap.exporting",
    "load": "layerswap.swapping",
    "plan": "layerswap.swapping",
    "swap": "layerswap.swapping",
    "verify": "layerswap.verifying",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("layerswap")
    if name not in _HOMES:
        raise AttributeError(f"module 'layerswap' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
