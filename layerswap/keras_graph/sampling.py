"""Samples from what Keras users have: datasets, generators, folders of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from layerswap.errors import ExportError, LoadError, UsageError, reason_of
from layerswap.keras_graph.running import input_dtypes, interface_of
from layerswap.records import Array
from layerswap.samples import (
    MOST,
    Input,
    Samples,
    from_arrays,
    from_elements,
    from_indexed,
    read_arrays,
    spaced,
    without_labels,
)

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif")


def read_samples(model: Any, source: Any, limit: int = MOST) -> Samples:
    """Samples for a model, from anything that holds them.

    Args:
        model: a tf_keras model; says what its inputs look like.
        source: an array (a list of them or a dict by name for several inputs), a
            `tf.data.Dataset`, a `tf_keras.utils.Sequence`, a generator or another iterable of
            samples or batches, a function that gives one of these, or the path of a `.npy` or
            `.npz` file or of a folder of images.
        limit: the most samples to take.

    Raises:
        UsageError, LoadError: they can't be read or don't fit the model.
    """
    inputs = inputs_of(model)
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source), inputs, limit)
    elif callable(source) and not hasattr(source, "__getitem__"):
        source = _called(source)
    if isinstance(source, Samples):
        return source
    source = without_labels(source)
    if isinstance(source, list | Mapping) or hasattr(source, "__array__"):
        return from_arrays(source, inputs, limit)
    if hasattr(source, "__getitem__") and not isinstance(source, type):
        return from_indexed(source, inputs, limit)
    if not hasattr(source, "__iter__"):
        raise UsageError(
            f"samples can't be read from a {type(source).__name__}",
            hint="Give arrays, a tf.data.Dataset, a generator or a path.",
        )
    return from_elements(source, inputs, limit)


def inputs_of(model: Any) -> list[Input]:
    """The inputs that a model takes, the batch open unless the model fixes it.

    Raises:
        UsageError: they are unknown, or not dense.
    """
    try:
        interface = interface_of(model)
        dtypes = input_dtypes(model)
    except ExportError as error:
        raise UsageError(
            error.message, where=error.where, hint="Call the model once on a batch."
        ) from error
    return [Input(*entry) for entry in zip(interface.inputs, interface.shapes, dtypes, strict=True)]


def _called(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # whatever the user's code raises
        raise LoadError(
            f"the function that gives the samples raised {type(error).__name__}: {reason_of(error)}"
        ) from error


def _read(path: Path, inputs: Sequence[Input], limit: int) -> Any:
    if path.is_dir():
        return _images(path, inputs, limit)
    if not path.is_file():
        raise LoadError("there is no such file or folder of samples", where=str(path))
    if path.suffix not in (".npy", ".npz"):
        raise UsageError(
            f"samples can't be read from a file with the suffix '{path.suffix}'",
            where=str(path),
            hint="Give .npy, .npz, a folder of images, or module:function.",
        )
    return read_arrays(path)


def _images(folder: Path, inputs: Sequence[Input], limit: int) -> Iterator[Array]:
    """The images of a folder and those below it, evenly spaced by path; values 0 to 255."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES and f.is_file())
    if not files:
        raise LoadError(f"holds no image ({', '.join(IMAGES)})", where=str(folder))
    if len(inputs) > 1 or len(inputs[0].shape) != 4:
        raise UsageError("the model's input is no image", hint="Give the samples as .npz.")
    height, width, channels = inputs[0].shape[1:]
    for file in (files[i] for i in spaced(len(files), limit)):
        try:
            image = tf.io.decode_image(
                file.read_bytes(), channels=channels or 0, expand_animations=False
            ).numpy()
        except Exception as error:  # whatever TensorFlow raises for a damaged file
            raise LoadError("can't be read as an image", where=str(file)) from error
        if height not in (None, image.shape[0]) or width not in (None, image.shape[1]):
            raise UsageError(
                f"an image of {image.shape[0]} × {image.shape[1]} pixels, but the model takes "
                f"{height} × {width}",
                where=str(file),
                hint="Resize the images before; layerswap doesn't guess how the model saw them.",
            )
        yield image
