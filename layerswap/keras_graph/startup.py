"""The first import of TensorFlow, which takes seconds and talks."""

from __future__ import annotations

import importlib.util
import os
import sys


def start_tensorflow() -> None:
    """Imports TensorFlow, if it is installed, without its chatter, unless the user asks for it."""
    if "tensorflow" in sys.modules or importlib.util.find_spec("tensorflow") is None:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    os.dup2(null, 2)  # its C++ part writes to the descriptor before logging is set up
    try:
        import tensorflow as tf
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
    tf.get_logger().setLevel("ERROR")
