"""Finds classes whose constructor would bring BatchNormalization back when a file is read."""

from __future__ import annotations

from typing import Any

from tf_keras.layers import GroupNormalization
from tf_keras.models import Model

from layerswap.errors import ExportError
from layerswap.keras_graph.walk import find_batchnorms, find_layers


def refuse_recreated(model: Any) -> None:
    """Refuses to save a model that Keras could not read back as it is.

    `.keras`, `.h5` and SavedModel hold a custom layer's class and configuration; its sublayers
    are made by its constructor. Where that makes a BatchNormalization, the file would not hold
    the swap.

    Raises:
        ExportError: names the classes and the remedy.
    """
    layers = find_layers(model)
    hosts = {
        id(found.host.layer): found.host.layer
        for found in layers
        if found.host is not None and isinstance(found.layer, GroupNormalization)
    }
    # A model class of one's own may build its graph in its constructor.
    own = [model, *(found.layer for found in layers if isinstance(found.layer, Model))]
    hosts |= {id(each): each for each in own if not type(each).__module__.startswith("tf_keras.")}
    classes = sorted({type(host).__name__ for host in hosts.values() if _brings_back(host)})
    if classes:
        raise ExportError(
            f"{', '.join(classes)} creates BatchNormalization in its constructor, so reading a "
            "file back would undo the swap",
            where=str(model.name),
            hint="Make the class create GroupNormalization, or export to ONNX.",
        )


def _brings_back(host: Any) -> bool:
    try:
        fresh = type(host).from_config(host.get_config())
    except Exception:  # it has no configuration, so that no file can bring anything back
        return False
    return bool(find_batchnorms(fresh))
