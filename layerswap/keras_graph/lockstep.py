"""Runs models side by side and stops them all where they come to the same layer.

Each run of a model on a batch is a lane: a thread of its own that pauses in the `call` of every
layer that is watched, and goes on when it is told to. One thread runs at a time. So one pass of a
model is enough to look at, and to change, each of its layers after all that comes before it is
settled, however the layers are nested, shared or called, and only what is still needed is held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from layerswap.errors import LayerswapError, TransferError, reason_of
from layerswap.keras_graph.interception import batchnorm_calls, groupnorm_calls

Run = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Visit:
    """A call of a watched layer.

    Attributes:
        path: the layer's.
        tensor: the input of a GroupNormalization, the output of a BatchNormalization.
    """

    path: str
    tensor: Any


class _Lane:
    """A run of a model that pauses at its watched layers.

    Attributes:
        result: what the run returned, once it is over.
        reply: what the GroupNormalization at which it pauses is to return, instead of computing.
    """

    def __init__(self, run: Run, watched: Mapping[int, str], own: Sequence[Any]):
        """Prepares the run; `advance` starts it.

        Args:
            run: calls the model.
            watched: `id` of a layer → its path.
            own: the watched layers.
        """
        self.result: Any = None
        self.reply: Any = None
        self._run, self._watched, self._own = run, watched, own
        self._visit: Visit | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._resume, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, daemon=True)

    def advance(self) -> Visit | None:
        """Runs on to the next watched call; None at the end.

        Raises:
            Exception: whatever the model raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resume.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        visit, self._visit = self._visit, None
        return visit

    def close(self) -> None:
        """Ends the run where it is."""
        if self._thread.is_alive():
            self._closing = True
            self._resume.release()
            self._thread.join()

    def _work(self) -> None:
        try:
            with (
                batchnorm_calls.by(self._batchnorm, self._own),
                groupnorm_calls.by(self._groupnorm),
            ):
                self.result = self._run()
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._paused.release()

    def _batchnorm(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = batchnorm_calls.stock(layer, *args, **kwargs)
        if id(layer) in self._watched and _is_real(output):
            self._pause(layer, output)
        return output

    def _groupnorm(self, layer: Any, inputs: Any, mask: Any = None) -> Any:
        if id(layer) in self._watched and _is_real(inputs):
            self._pause(layer, inputs)
            output, self.reply = self.reply, None
            if output is not None:
                return output
        return groupnorm_calls.stock(layer, inputs, mask)

    def _pause(self, layer: Any, tensor: Any) -> None:
        if not self._closing:  # code may have swallowed what unwinds the run
            self._visit = Visit(self._watched[id(layer)], tensor)
            del tensor
            self._paused.release()
            self._resume.acquire()
        if self._closing:
            raise _Closed


def _is_real(tensor: Any) -> bool:
    """Not symbolic: a Sequential without an Input builds its graph anew for another shape."""
    return isinstance(tensor, tf.__internal__.EagerTensor)


class _Closed(BaseException):
    """Unwinds a run that is given up."""


@dataclass(frozen=True, slots=True)
class Side:
    """A model in lockstep with others.

    Attributes:
        runs: one for each batch; each calls the model.
        layers: those to pause at, by path.
    """

    runs: Sequence[Run]
    layers: Mapping[str, Any]


class Lockstep:
    """Runs all sides from one watched call to the next; a context manager and an iterator.

    Each step gives the path of the layer that all runs have come to, and for each side the
    tensors there, one for each batch: inputs of a GroupNormalization, outputs of a
    BatchNormalization. The runs end with the block at the latest.

    Attributes:
        results: for each side what its runs returned, once the iteration is over.
    """

    def __init__(self, *sides: Side) -> None:
        self.results: list[list[Any]] = []
        self._sides = []
        for side in sides:
            watched = {id(layer): path for path, layer in side.layers.items()}
            own = list(side.layers.values())
            self._sides.append([_Lane(run, watched, own) for run in side.runs])

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *_: object) -> None:
        for side in self._sides:
            for lane in side:
                lane.close()

    def reply(self, side: int, outputs: Sequence[Any]) -> None:
        """Sets what the GroupNormalization of the present step returns, for each batch.

        Whoever looks at the inputs may know the outputs already.
        """
        for lane, output in zip(self._sides[side], outputs, strict=True):
            lane.reply = output

    def __iter__(self) -> Iterator[tuple[str, list[list[Any]]]]:
        """The steps.

        Raises:
            TransferError: a model fails, or the runs come to different layers.
        """
        while True:
            met = [[_advance(lane) for lane in side] for side in self._sides]
            paths = {visit.path if visit else "the end" for side in met for visit in side}
            if len(paths) > 1:
                raise TransferError(
                    "the model calls its layers differently from batch to batch: it came to "
                    + " or to ".join(sorted(paths)),
                    hint="Convert without samples.",
                )
            path = paths.pop()
            if met[0][0] is None:
                break
            tensors = [[visit.tensor for visit in side if visit] for side in met]
            del met
            yield path, tensors
        self.results = [[lane.result for lane in side] for side in self._sides]


def _advance(lane: _Lane) -> Visit | None:
    try:
        return lane.advance()
    except LayerswapError:
        raise
    except Exception as error:  # whatever a user's layer raises
        raise TransferError(
            f"the model fails on the samples: {reason_of(error)}",
            hint="Check that they are what the model was trained on.",
        ) from error
