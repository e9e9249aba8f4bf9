"""What the machine is and how busy it is: every benchmark prints it with its numbers."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "layerswap",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "opencv-python-headless",
    "tensorflow",
    "tf_keras",
    "tf2onnx",
)


def describe() -> str:
    """The date, cores, load average and versions, as lines of text."""
    try:
        load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    except (AttributeError, OSError):  # not on every platform
        load = "unknown"
    lines = [
        f"date: {datetime.date.today().isoformat()}",
        f"machine: {platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        f"load average (1, 5, 15 min): {load}",
        f"python {platform.python_version()}",
    ]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    return "\n".join(lines)
