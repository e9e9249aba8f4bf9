"""Judges an ONNX file by every rule that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from layerswap.criteria import Criteria
from layerswap.onnx_graph import file_rules, norm_rules, operator_rules, weight_rules
from layerswap.onnx_graph.normalizations import find_norms
from layerswap.onnx_graph.reading import read_model
from layerswap.onnx_graph.subjects import Subject
from layerswap.onnx_graph.views import GraphView
from layerswap.records import Checked, Finding

_RULES: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    norm_rules.judge_norms,
    norm_rules.judge_gammas,
    operator_rules.judge_operators,
    operator_rules.judge_targets,
    file_rules.judge_interface,
    file_rules.judge_external,
    file_rules.judge_origin,
)


def check_onnx_file(
    path: str | os.PathLike[str], criteria: Criteria
) -> tuple[Checked, list[Finding]]:
    """Looks at every operator of an ONNX file, in bodies and local functions, too.

    Args:
        path: the `.onnx` file.
        criteria: the limits that the rules know. Which rules apply is left to the caller.

    Returns:
        The operators that normalise, and what there is to say.

    Raises:
        LoadError: it is no ONNX file.
    """
    view = GraphView(read_model(path), Path(path).parent)
    norms = find_norms(view)
    subject = Subject(Path(path), view, norms, criteria)
    rules = (*_RULES, weight_rules.judge_weights) if criteria.weights else _RULES
    findings = [finding for rule in rules for finding in rule(subject)]
    return Checked(os.fspath(path), len(view.places), tuple(n.record for n in norms)), findings
