"""Says which model an artifact was made of: hashes and tables for its metadata.

A file of the same model differs from save to save (it holds times), so the hash covers what
counts: configuration and weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from layerswap.keras_graph.carrier import CallSite
from layerswap.keras_graph.weights import view
from layerswap.records import SwapPlan


def describe(
    model: Any, source: Any | None, plan: SwapPlan | None, calls: Iterable[CallSite]
) -> dict[str, str]:
    """Metadata of an exported model; the same model and policy give the same text.

    Args:
        model: the model that is exported.
        source: the BN model, where it is known.
        plan: the swap that the model came of, if any.
        calls: the calls of GroupNormalization in the exported graph.

    Returns:
        `layerswap.model` and `layerswap.source`, SHA-256 of configuration and weights;
        `layerswap.policy`, SHA-256 of the policy as sorted JSON; `layerswap.swaps` and
        `layerswap.groupnorms`, JSON tables of the swapped layers and of the calls.
    """
    facts = {"layerswap.model": model_hash(model)}
    if source is not None:
        facts["layerswap.source"] = model_hash(source)
    table = [
        {
            "path": call.path,
            "channels": call.channels,
            "groups": call.groups,
            "epsilon": call.epsilon,
            "rank": call.rank,
        }
        for call in calls
    ]
    facts["layerswap.groupnorms"] = _json(table)
    if plan is not None:
        facts["layerswap.policy"] = hashlib.sha256(_json(plan.policy).encode()).hexdigest()
        facts["layerswap.swaps"] = _json(
            [
                {
                    "path": swap.site.path,
                    "channels": swap.channels,
                    "groups": swap.groups,
                    "axis": swap.config["axis"],
                    "epsilon": swap.config["epsilon"],
                    "weights": swap.weights,
                }
                for swap in plan.swaps
            ]
        )
    return facts


def model_hash(model: Any) -> str:
    """SHA-256 of a model's configuration, and of its weights in order: name, type, shape, bytes.

    A subclassed model that has no configuration counts with the name of its class.
    """
    try:
        config: Mapping[str, Any] = model.get_config()
    except NotImplementedError:
        config = {}
    digest = hashlib.sha256(_json([type(model).__name__, config]).encode())
    for variable in model.weights:
        value = view(tf.convert_to_tensor(variable))
        digest.update(f"{variable.name} {value.dtype.name} {value.shape}".encode())
        text = value.dtype.kind in "OSU"
        digest.update(repr(value.tolist()).encode() if text else np.ascontiguousarray(value).data)
    return digest.hexdigest()


def _json(value: Any) -> str:
    # What JSON doesn't know counts with its class: an object's text may hold its address.
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), default=lambda item: type(item).__qualname__
    )
