"""How exact each form of GroupNormalization is in ONNX Runtime, against NumPy in float64.

    python benchmarks/precision.py

The inputs are the hard ones of the tests (`HARD` in `tests/groupnorm_graphs.py`), the truth is
`tests/oracle.py`. A cell is the largest error over the largest |γ|. The table goes into
`docs/export.md`. How busy the machine is doesn't matter.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pages

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the inputs and the truth are


def errors(folder: Path) -> dict[str, dict[str, float]]:
    """For each input the error of each form."""
    import oracle
    from groupnorm_graphs import GROUPS, HARD, exact_affine, expanded, model_of
    from layerswap.onnx_graph.runtimes import open_runtime
    from layerswap.records import PROFILE_OPSETS

    gamma, beta = exact_affine()
    path, runtime = folder / "m.onnx", open_runtime("onnxruntime")
    found: dict[str, dict[str, float]] = {}
    for name, (values, epsilon) in HARD.items():
        x = values.astype(np.float32)
        truth = oracle.group_norm(x, GROUPS, gamma, beta, epsilon, axis=1)
        found[name] = {}
        for form, oldest in PROFILE_OPSETS.items():
            shape, opset = [None, *x.shape[1:]], max(18, oldest)
            model = model_of(shape, GROUPS, gamma, beta, epsilon=epsilon, opset=opset)
            onnx.save(expanded(model, form), path)
            got = runtime.session(path)({"x": x})["y"]
            found[name][form] = float(np.abs(got - truth).max() / np.abs(gamma).max())
    return found


def main() -> None:
    """Prints the table and writes it."""
    with tempfile.TemporaryDirectory() as folder:
        found = errors(Path(folder))
    forms = list(next(iter(found.values())))
    rows = {
        name: ["NaN" if np.isnan(row[form]) else f"{row[form]:.1e}" for form in forms]
        for name, row in found.items()
    }
    text = pages.with_machine(pages.table(("input", *forms), rows))
    print(text)
    pages.replace("export.md", "precision", text)


if __name__ == "__main__":
    main()
