"""Breaks the swap on purpose, one way at a time, and shows which test notices.

    python tests/mutations.py [--jobs N] [NAME ...]      (make mutations)

Each mutation is a small textual patch to a temporary copy of the package, which tests then import
in place of the working tree; that stays as it is. First the same tests run on an unbroken copy.
Exit code 1: a mutation survives, a patch no longer applies, or the unbroken copy fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONVERSION = "tests/test_conversion.py"
ZOO = "tests/test_zoo.py"
COMPILED = "tests/keras_graph/test_compiling.py"
REBUILT = "tests/keras_graph/test_rebuild.py"
SELFCHECKED = "tests/keras_graph/test_selfcheck.py"
LINTED = "tests/onnx_graph/test_lint.py"
JUDGED = "tests/test_linting.py"
LIMIT_S = 900
# Pytest's exit codes; all others mean that no test has judged.
PASSED, FAILED = 0, 1


class DoesNotApply(Exception):
    """The text that a patch replaces isn't there, or isn't there once."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One way to break the swap.

    Attributes:
        name: what is broken, in words.
        edits: (module below `layerswap/`, text that occurs in it once, its replacement).
        tests: files that must notice.
        only: expression that chooses among their tests; nothing for all.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...] = (CONVERSION,)
    only: str = ""


def broken(
    name: str, *edits: tuple[str, str, str], at: str = CONVERSION, only: str = ""
) -> Mutation:
    return Mutation(name, edits, (at,), only)


WALK = "keras_graph/walk.py"
SITES = "keras_graph/sites.py"
REBUILD = "keras_graph/rebuild.py"
COPYING = "keras_graph/copying.py"
COMPILING = "keras_graph/compiling.py"
OBSERVING = "keras_graph/observing.py"

MUTATIONS = (
    broken(
        "nested models are skipped",
        (
            WALK,
            "if not isinstance(found.layer, BatchNormalizationBase):\n",
            "if not (isinstance(found.layer, BatchNormalizationBase) or found.path):\n",
        ),
        (WALK, "for layer in model._flatten_layers(include_self=False):", "for layer in ():"),
        at=ZOO,
        only="a_copy and (four_deep or nested_used_twice)",
    ),
    broken(
        "what Keras tracks and no attribute leads to is missed",
        (WALK, "for layer in model._flatten_layers(include_self=False):", "for layer in ():"),
        at=REBUILT,
    ),
    broken(
        "BN in a list is missed",
        (WALK, "isinstance(value, list | tuple | set | frozenset)", "isinstance(value, tuple)"),
        only="custom_code",
    ),
    broken(
        "the normalised axis is always the last",
        ("rules.py", "return site.axis, site.channels\n", "return site.rank - 1, site.channels\n"),
        at=ZOO,
        only="a_copy and (channels_first or middle_axis)",
    ),
    broken(
        "GN's epsilon isn't the one of the policy",
        (
            "rules.py",
            'return float(site.config["epsilon"]) if rule == "carry" else float(rule)',
            "return moments.LEAST_ADAPTIVE_EPSILON",
        ),
        only="every_field",
    ),
    broken(
        "epsilon doesn't adapt to the layer's variance",
        (
            "rules.py",
            "return moments.adaptive_epsilon(statistics, groups, policy.adaptive_k)",
            "return moments.LEAST_ADAPTIVE_EPSILON",
        ),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "the fit takes BN's epsilon where GN's belongs",
        (
            "rules.py",
            'swap.groups, epsilon, float(swap.config["epsilon"]))',
            "swap.groups, epsilon, epsilon)",
        ),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "BN's own epsilon is left out of the fit",
        ("moments.py", "statistics.variance + epsilon))", "statistics.variance))"),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "spread of the channels' means is left out of a group's variance",
        (
            "moments.py",
            "(variance + (mean - group_mean[:, None]) ** 2).mean(axis=1)",
            "variance.mean(axis=1)",
        ),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "gamma and beta are swapped",
        (
            REBUILD,
            "((layer.gamma, affine.gamma), (layer.beta, affine.beta))",
            "((layer.gamma, affine.beta), (layer.beta, affine.gamma))",
        ),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "predict goes on with the function traced before the swap",
        (COMPILING, "    target._reset_compile_cache()\n", ""),
        at=COMPILED,
    ),
    broken(
        "predict of a nested model goes on with the function traced before the swap",
        (
            COMPILING,
            "        target._reset_compile_cache()\n",
            "        target._reset_compile_cache() if target.name != 'middle' else None\n",
        ),
        at=COMPILED,
    ),
    broken(
        "the trainable flag is lost",
        (REBUILD, "{**vars(new), **ties}", '{**vars(new), **ties, "_trainable": True}'),
        at=ZOO,
        only="a_copy and (partly_frozen)",
    ),
    broken(
        "variables are shared with the original",
        (
            COPYING,
            "    memo.update({id(value): value for value in shared})\n",
            "    memo.update({id(value): value for value in (*shared, *model.weights)})\n",
        ),
        only="configuration",
    ),
    broken(
        "names of the new variables lack the layer's scope",
        (REBUILD, 'tf.name_scope(f"{scope}/" if scope else "")', 'tf.name_scope("")'),
        at=REBUILT,
    ),
    broken(
        "masked BN isn't refused",
        (SITES, "    if any(map(is_masked, found.nodes)):", "    if False:"),
        (SITES, "        if observed.masked:", "        if False:"),
        only="no_counterpart or can_t_take",
    ),
    broken(
        "BN masked inside of custom code isn't refused",
        (SITES, "        if observed.masked:", "        if False:"),
        only="no_counterpart or can_t_take",
    ),
    broken(
        "training passed by position isn't refused",
        (OBSERVING, "        if args:\n", "        if False:\n"),
        only="no_counterpart or can_t_take",
    ),
    broken(
        "a subclass that computes something else isn't refused",
        (SITES, "    elif foreign:", "    elif False:"),
        only="no_counterpart or can_t_take",
    ),
    broken(
        "statistics that hold NaN aren't refused",
        (
            "rules.py",
            "    if not statistics.finite:\n        raise",
            "    if False:\n        raise",
        ),
        only="nonfinite",
    ),
    broken(
        "the optimizer's slots are mixed up: m for v",
        (
            COMPILING,
            "        if not (isinstance(slots, list) and isinstance(fresh, list)):\n",
            '        mixed = {"_momentums": "_velocities", "_velocities": "_momentums"}\n'
            "        fresh = vars(new).get(mixed.get(name, name))\n"
            "        if not (isinstance(slots, list) and isinstance(fresh, list)):\n",
        ),
        at=COMPILED,
    ),
    broken(
        "the optimizer's slots are mixed up: those of another variable",
        (
            COMPILING,
            "fresh[place].assign(slots[position])",
            "fresh[place].assign(next(s for s in slots[::-1] if s.shape == variable.shape))",
        ),
        at=COMPILED,
    ),
    broken(
        "slots of a legacy optimizer are dropped",
        (COMPILING, "                after.assign(before)\n", "                pass\n"),
        at=COMPILED,
    ),
    broken(
        "the last BN is left, and the self-check is off",
        (
            REBUILD,
            "        _turn(sites[swap.site.path], new)\n",
            "        if swap is not plan.swaps[-1]:\n"
            "            _turn(sites[swap.site.path], new)\n",
        ),
        ("swapping.py", "    if self_check:\n", "    if False:\n"),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "the self-check isn't run",
        ("swapping.py", "    if self_check:\n", "    if False:\n"),
        at=REBUILT,
    ),
    broken(
        "the self-check sees no BN that is left",
        ("keras_graph/selfcheck.py", "and path not in kept\n", "and False\n"),
        at=SELFCHECKED,
    ),
    broken(
        "the self-check doesn't compare with float64",
        ("keras_graph/selfcheck.py", "if not error <= scale:", "if False:"),
        at=SELFCHECKED,
    ),
    broken(
        "layers are changed before all of them are known to be possible",
        (
            REBUILD,
            "fresh = [_build(swap, sites[swap.site.path]) for swap in plan.swaps]",
            "fresh = (_build(swap, sites[swap.site.path]) for swap in plan.swaps)",
        ),
        at=REBUILT,
    ),
    broken(
        "recorded calls keep `training`, which GN doesn't take",
        (REBUILD, "        _strip_arguments(node)\n", "        pass\n"),
        at=ZOO,
        only="a_copy and (residual or training_fixed_at_the_call or nested_used_twice)",
    ),
    broken(
        "metrics are shared with the original",
        (COMPILING, "    if not isinstance(metric, Metric):\n", "    if True:\n"),
        only="configuration",
    ),
    broken(
        "regularizers are dropped",
        ("rules.py", "return site.config.get(part, default)", "return default"),
        only="losses",
    ),
    broken(
        "a layer held by a function is shared with the copy",
        (COPYING, "for path in captured_by_functions(layer):", "for path in ():"),
        only="function",
    ),
    broken(
        "16-bit statistics stay in 16 bits",
        ("rules.py", '.startswith("mixed_") and site.consumers_cast', '.startswith("none")'),
        only="16_bit",
    ),
    broken(
        "an ONNX file's lengths are wrong from 128 on",
        ("onnx_graph/files.py", "while number > 0x7F:", "while number > 0xFF:"),
        at="tests/onnx_graph/test_files.py",
    ),
    broken(
        "sizes of images go through float16",
        (
            "onnx_graph/half_rules.py",
            "if not all(n in narrow or n in self._moderate for n in moving):",
            "if False:",
        ),
        at="tests/onnx_graph/test_float16.py",
    ),
    broken(
        "weights too small or too large for float16 are halved",
        (
            "onnx_graph/half_rules.py",
            "if not float(_FLOAT16.tiny) <= largest <= float(_FLOAT16.max):",
            "if False:",
        ),
        at="tests/onnx_graph/test_float16.py",
    ),
    broken(
        "the form precise leaves the mean in",
        ("onnx_graph/profiles.py", "writer.batch_norm, centred=True", "writer.batch_norm"),
        at="tests/onnx_graph/test_profiles.py",
    ),
    broken(
        "a graph's opset isn't raised",
        ("onnx_graph/opsets.py", '    versions[""].version = opset\n', ""),
        at="tests/test_exporting.py",
        only="native",
    ),
    broken(
        "the affine becomes a convolution whatever follows",
        ("onnx_graph/targets.py", "not in _TAKEN_IN", "in ()"),
        at="tests/onnx_graph/test_targets.py",
    ),
    broken(
        "a padded convolution becomes a product of matrices",
        ("onnx_graph/targets.py", "        not plain\n", "        False\n"),
        at="tests/onnx_graph/test_targets.py",
    ),
    broken(
        "constants of the preprocessing aren't transposed",
        ("onnx_graph/repairs.py", "full.transpose(permutation)", "full"),
        at="tests/onnx_graph/test_attach.py",
    ),
    broken(
        "weights of a replaced file stay beside it",
        ("destinations.py", "stale.unlink(missing_ok=True)", "pass"),
        at="tests/test_exporting.py",
        only="beside",
    ),
    broken(
        "the hash of a model leaves out its weights",
        ("keras_graph/identity.py", "for variable in model.weights:", "for variable in ():"),
        at="tests/test_exporting.py",
        only="metadata",
    ),
    broken(
        "external data isn't part of an artifact's identity",
        ("references.py", "elif data_path(path).is_file():", "elif False:"),
        at="tests/test_exporting.py",
        only="beside",
    ),
    broken(
        "two threads trace through one replacement",
        (
            "keras_graph/interception.py",
            "self._local = threading.local()",
            "self._local = type('Shared', (), {})()",
        ),
        at="tests/keras_graph/test_serving.py",
        only="thread",
    ),
    broken(
        "functions of the user's keep the export's form of GroupNormalization",
        ("keras_graph/tracing.py", "    return graph is _active.graph\n", "    return True\n"),
        at="tests/keras_graph/test_serving.py",
    ),
    broken(
        "a fit is kept whatever it does to held-out samples",
        ("fitting.py", "        if error < best.error:\n", "        if True:\n"),
        at="tests/test_fitting.py",
    ),
    broken(
        "the mean taken from a layer's output isn't put back into its sums",
        ("keras_graph/measuring.py", "        t=st + positions * offset,\n", "        t=st,\n"),
        at="tests/keras_graph/test_calibrating.py",
        only="chain",
    ),
    broken(
        "a calibration that makes the outputs worse is kept",
        ("keras_graph/calibrating.py", "    if not kept:\n", "    if False:\n"),
        at="tests/keras_graph/test_calibrating.py",
        only="taken_back",
    ),
    broken(
        "distillation keeps its last state",
        ("keras_graph/distilling.py", "        restore(work, best)\n", "        pass\n"),
        at="tests/keras_graph/test_distilling.py",
        only="no_worse",
    ),
    broken(
        "samples are judged by samples that were fitted to",
        ("samples.py", "permutation[border:]", "permutation[: count // 4]"),
        at="tests/test_samples.py",
    ),
    broken(
        "calls of the source change its state",
        (
            "keras_graph/weights.py",
            "                variable.assign(bits)\n",
            "                pass\n",
        ),
        at="tests/keras_graph/test_calibrating.py",
        only="put_back",
    ),
    broken(
        "a BatchNormalization that adds an epsilon counts as an affine",
        ("onnx_graph/normalizations.py", 'attribute(node, "epsilon", 1e-5) == 0', "True"),
        at=LINTED,
    ),
    broken(
        "a BatchNormalization that has been told to train counts as an affine",
        (
            "onnx_graph/normalizations.py",
            "if len(node.input) != 5 or _trains(place):",
            "if len(node.input) != 5:",
        ),
        at=LINTED,
    ),
    broken(
        "bodies of operators aren't looked into",
        (
            "onnx_graph/views.py",
            "for body in subgraphs(node):\n                self._graph",
            "for body in ():\n                self._graph",
        ),
        at=LINTED,
    ),
    broken(
        "a weight may be read from anywhere",
        (
            "onnx_graph/external.py",
            ".is_relative_to(folder.resolve())",
            ".exists() or True",
        ),
        at=LINTED,
    ),
    broken(
        "a divisor of the channels that isn't one",
        ("layer_rules.py", "if channels is not None and channels % groups:", "if False:"),
        at=LINTED,
    ),
    broken(
        "an input that hides a constant of the same name",
        (
            "onnx_graph/views.py",
            "return None if name in home.fed else home.tensors.get(name)",
            "return home.tensors.get(name)",
        ),
        at=LINTED,
    ),
    broken(
        "what can't be read can be ignored",
        (
            "criteria.py",
            "if code in _ALWAYS:\n            return True",
            "if False:\n            return True",
        ),
        at="tests/test_criteria.py",
    ),
    broken(
        "the last override of a file applies, not the first",
        (
            "criteria.py",
            "                break\n        return Criteria",
            "        return Criteria",
        ),
        at="tests/test_criteria.py",
    ),
    broken(
        "only the first runtime asked for runs",
        (
            "linting.py",
            "for runtime in (criteria.runtime or (None,)) if run else ():",
            "for runtime in (criteria.runtime[:1] or (None,)) if run else ():",
        ),
        at=JUDGED,
    ),
)


def mutated(mutation: Mutation | None, folder: Path) -> None:
    """Puts a copy of the package into `folder`, broken as the mutation says.

    Raises:
        DoesNotApply: the package has changed; the mutation must be written anew.
    """
    package = folder / "layerswap"
    shutil.copytree(ROOT / "layerswap", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in mutation.edits if mutation else ():
        text = (package / name).read_text()
        if text.count(old) != 1:
            raise DoesNotApply(f"{name} has {text.count(old)} times: {old.strip()}")
        (package / name).write_text(text.replace(old, new))


def run_tests(mutation: Mutation | None, tests: tuple[str, ...], only: str) -> tuple[int, str]:
    """Pytest's exit code and output, its tests importing a copy that is broken as said."""
    with tempfile.TemporaryDirectory(prefix="layerswap-mutation-") as name:
        folder = Path(name)
        mutated(mutation, folder)
        # Python puts the working folder first, before any installed copy.
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no"]
        command += ["-p", "no:cacheprovider", f"--rootdir={ROOT}", f"-c{ROOT / 'pyproject.toml'}"]
        command += ["-x"] if mutation else []
        command += ["-k", only] if only else []
        command += [str(ROOT / test) for test in tests]
        environment = {**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return -1, f"still running after {LIMIT_S} s"
    return done.returncode, done.stdout + done.stderr


def check_import() -> None:
    """The copy, and no installed package, is what tests import.

    Raises:
        RuntimeError: it isn't; every verdict would be void.
    """
    with tempfile.TemporaryDirectory(prefix="layerswap-mutation-") as name:
        mutated(None, Path(name))
        command = [sys.executable, "-c", "import layerswap; print(layerswap.__file__)"]
        got = subprocess.check_output(command, cwd=name, text=True).strip()
        if not Path(got).resolve().is_relative_to(Path(name).resolve()):
            raise RuntimeError(f"tests would import {got}")


def judge(mutation: Mutation) -> tuple[bool, str]:
    """Whether a test notices, and which one or why not."""
    try:
        code, output = run_tests(mutation, mutation.tests, mutation.only)
    except DoesNotApply as error:
        return False, f"the patch no longer applies: {error}"
    if code == PASSED:
        return False, "SURVIVED"
    if code != FAILED:
        last = output.strip().splitlines()[-1:] or ["no output"]
        return False, f"no test has judged (exit code {code}): {last[0]}"
    failed = re.findall(r"^FAILED \S*?(tests/\S+)", output, re.MULTILINE)
    return bool(failed), failed[0] if failed else f"no test is named: {output[-300:]}"


def unbroken(chosen: list[Mutation]) -> Iterator[str]:
    """What fails on a copy that isn't broken, of the tests that the mutations run."""
    for test in sorted({test for mutation in chosen for test in mutation.tests}):
        parts = {mutation.only for mutation in chosen if test in mutation.tests}
        only = "" if "" in parts else " or ".join(sorted(parts))
        code, output = run_tests(None, (test,), only)
        if code != PASSED:
            yield output[-2000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutations whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default: 2)")
    arguments = parser.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not arguments.names or any(part in mutation.name for part in arguments.names)
    ]
    check_import()
    for output in unbroken(chosen):
        print(f"The tests fail on the unbroken package already:\n{output}")
        return 1
    survived = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, (caught, by) in zip(chosen, pool.map(judge, chosen), strict=True):
            survived += not caught
            print(f"{'caught' if caught else 'MISSED'}  {mutation.name}\n        {by}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations are caught")
    return 1 if survived or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
