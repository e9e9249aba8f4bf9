"""Resize in OpenCV: what it asks for that OpenCV doesn't do."""

from __future__ import annotations

from layerswap.onnx_graph.facts import array, number, numbers, shape, text
from layerswap.onnx_graph.views import Place

_UNKNOWN = ("half_pixel_symmetric", "tf_crop_and_resize")


def asks_for_more_than_scale(place: Place) -> bool:
    """Whether it has an option that OpenCV 5.0.0 refuses or leaves out."""
    return (
        number(place, "antialias") == 1
        or bool(numbers(place, "axes"))
        or text(place, "keep_aspect_ratio_policy", "stretch") != "stretch"
        or text(place, "coordinate_transformation_mode") in _UNKNOWN
    )


def rounds_size(place: Place) -> bool:
    """Whether a scale times the input's size isn't whole, so that the output's is rounded."""
    scales, sizes = array(place, 2), shape(place)
    if scales is None or sizes is None or scales.shape != (len(sizes),):
        return False
    pairs = zip(scales.tolist(), sizes, strict=True)
    return any(size is not None and not float(scale * size).is_integer() for scale, size in pairs)
