"""Puts another computation in the place of a layer class's `call`, for some threads only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tf_keras.layers import GroupNormalization
from tf_keras.src.layers.normalization.batch_normalization import BatchNormalizationBase

# Takes what `call` takes, the layer first.
Replacement = Callable[..., Any]


class Interception:
    """Stands between a class and those who call its layers.

    The class is changed while at least one thread asks for it; for all others it computes what
    it always did.

    Attributes:
        stock: the class's own `call`.
    """

    def __init__(self, kind: type) -> None:
        self.stock = kind.call  # type: ignore[attr-defined]
        self._kind = kind
        self._lock = threading.Lock()
        self._users = 0
        self._local = threading.local()

        def dispatch(layer: Any, *args: Any, **kwargs: Any) -> Any:
            replacement = self.replacement
            return (replacement or self.stock)(layer, *args, **kwargs)

        # Wears the stock signature: Keras and its wrappers read off the class what `call` takes.
        self._call = tf.__internal__.decorator.make_decorator(
            self.stock, tf.autograph.experimental.do_not_convert(dispatch)
        )

    @property
    def replacement(self) -> Replacement | None:
        """What stands in for `call` in this thread."""
        return getattr(self._local, "replacement", None)

    @contextmanager
    def by(self, replacement: Replacement, layers: Iterable[Any] = ()) -> Iterator[None]:
        """Within the block, and in this thread, `replacement` is called instead of `call`.

        Args:
            replacement: takes the layer, then what `call` takes.
            layers: those that may have an own `call`, which would go before the class's: Keras
                leaves one on a layer that was saved as a SavedModel.
        """
        own = [(vars(layer), vars(layer).pop("call")) for layer in layers if "call" in vars(layer)]
        outer, self._local.replacement = self.replacement, replacement
        with self._lock:
            self._users += 1
            self._kind.call = self._call  # type: ignore[attr-defined]
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._kind.call = self.stock  # type: ignore[attr-defined]
            self._local.replacement = outer
            for attributes, call in own:
                attributes["call"] = call


batchnorm_calls = Interception(BatchNormalizationBase)
groupnorm_calls = Interception(GroupNormalization)
