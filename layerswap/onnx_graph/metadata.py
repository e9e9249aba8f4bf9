"""What layerswap notes in an ONNX file of the model that it was made of."""

from __future__ import annotations

import json

import onnx

from layerswap.records import LayerRecord

MODEL = "layerswap.model"
GROUPNORMS = "layerswap.groupnorms"


def read_metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The properties of a file by name."""
    return {item.key: item.value for item in model.metadata_props}


def read_sites(model: onnx.ModelProto) -> list[LayerRecord] | None:
    """The calls of GroupNormalization that a file was made of, under the paths of their layers.

    None where the file has no such table, or one that can't be read.
    """
    try:
        return [
            LayerRecord(
                str(site["path"]),
                "GroupNormalization",
                "",
                (),
                channels=int(site["channels"]),
                groups=int(site["groups"]),
                epsilon=float(site["epsilon"]),
            )
            for site in json.loads(read_metadata(model)[GROUPNORMS])
        ]
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
