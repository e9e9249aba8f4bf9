"""SavedModel folders as any TensorFlow program runs them: no tf_keras, none of the model's code.

TensorFlow is imported on use only, so that this module can say that it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from layerswap.errors import MissingExtraError
from layerswap.keras_graph.startup import start_tensorflow
from layerswap.records import Array
from layerswap.runtimes import Runtime

SIGNATURE = "serving_default"


class SavedModel(Runtime):
    """TensorFlow on a SavedModel's signature `serving_default`."""

    name = "savedmodel"

    def __init__(self) -> None:
        start_tensorflow()
        try:
            import tensorflow as tf
        except ImportError as error:
            raise MissingExtraError("tensorflow", "keras", "running a SavedModel") from error
        self._module = tf
        self.version: str = tf.__version__

    def _load(self, path: str) -> Any:
        loaded = self._module.saved_model.load(path)
        signatures = getattr(loaded, "signatures", {})
        if SIGNATURE not in signatures:
            known = ", ".join(signatures) or "none"
            raise ValueError(f"it has no signature '{SIGNATURE}'; those it has: {known}")
        # The variables live as long as what was loaded does.
        return loaded, signatures[SIGNATURE]

    def _call(self, loaded: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
        _, signature = loaded
        return call_signature(signature, inputs)


def call_signature(signature: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """What a SavedModel's signature answers.

    Args:
        signature: as loaded.
        inputs: by the names that the artifact has for them. TensorFlow knows these as well as
            the identifiers that it makes of them.
    """
    import tensorflow as tf

    tensors = {name: tf.convert_to_tensor(array) for name, array in inputs.items()}
    return {name: np.asarray(tensor) for name, tensor in signature(**tensors).items()}
