"""Model files as tests: `pytest --layerswap model.onnx` adds one for each rule.

pytest imports this module at every start where layerswap is installed, so nothing else is
imported before a file is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from layerswap.catalog import Rule
    from layerswap.criteria import Criteria
    from layerswap.records import Finding, Report

# The rule that fails where no other can be applied.
UNREADABLE = "LS001"


class ModelWarning(UserWarning):
    """A finding that doesn't fail."""


class ModelFailure(Exception):
    """Findings of one rule, as text for people."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layerswap", "model files as tests")
    group.addoption(
        "--layerswap",
        action="append",
        default=[],
        metavar="FILE",
        help="Check this .onnx, .keras or .h5 file or SavedModel, a test for each rule; "
        "repeatable. Settings come from layerswap.toml or [tool.layerswap].",
    )
    for name, text in (("select", "Only these rules: LS201, LS2, ALL."), ("ignore", "Not these.")):
        group.addoption(
            f"--layerswap-{name}", action="append", default=[], metavar="CODE,...", help=text
        )


def pytest_configure(config: pytest.Config) -> None:
    options = config.option
    if not options.layerswap:
        return
    from layerswap.errors import LayerswapError
    from layerswap.settings import read_criteria

    chosen = {"select": options.layerswap_select, "ignore": options.layerswap_ignore}
    given = {name: words for name, words in chosen.items() if words}
    try:
        criteria = read_criteria(given, None, config.rootpath)
    except LayerswapError as error:
        raise pytest.UsageError(str(error)) from None
    here = config.invocation_params.dir
    paths = [Path(os.path.abspath(here / name)) for name in options.layerswap]
    config.pluginmanager.register(_Models(paths, criteria), "layerswap-models")


class _Models:
    """Collects each file once: where pytest selects it, else behind everything else."""

    def __init__(self, paths: list[Path], criteria: Criteria) -> None:
        self._paths = dict.fromkeys(paths)
        self._criteria = criteria

    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> Any:
        return self._collected(file_path, parent)

    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> Any:
        return self._collected(path, parent)

    @pytest.hookimpl(tryfirst=True)  # before -k and the like choose
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        selected = {item.path for item in items}
        for path in self._paths:
            if path not in selected:
                items.extend(self._model(path, session).collect())

    def _collected(self, path: Path, parent: pytest.Collector) -> ModelFile | None:
        return self._model(path, parent) if path in self._paths else None

    def _model(self, path: Path, parent: pytest.Collector) -> ModelFile:
        model: ModelFile = ModelFile.from_parent(parent, path=path, criteria=self._criteria)
        return model


class ModelFile(pytest.File):
    """A model file or SavedModel folder; read when the first of its tests runs."""

    def __init__(self, *, criteria: Criteria, **fields: Any) -> None:
        super().__init__(**fields)
        root = self.config.rootpath
        self.shown = Path(os.path.relpath(self.path, root)).as_posix()
        # Overrides are about paths as they are written in the settings.
        self._criteria = criteria.for_file(self.shown)
        self._report: Report | None = None

    def collect(self) -> Iterator[RuleTest]:
        from layerswap import catalog, checking

        kind = checking.kind_of(self.path)
        for rule in catalog.RULES:
            if self._criteria.covers(rule, kind):
                yield RuleTest.from_parent(self, name=rule.code, rule=rule)

    def report(self) -> Report:
        """What `check` says of it; one that can't be read is a finding, too.

        Raises:
            LayerswapError: the settings or what is installed don't allow to check it.
        """
        if self._report is None:
            from layerswap import checking, linting
            from layerswap.errors import LoadError

            try:
                self._report = linting.check(self.path, criteria=self._criteria)
            except LoadError as error:
                self._report = checking.unreadable_report(self.path, error, self._criteria)
        return self._report


class RuleTest(pytest.Item):
    """Whether a file is right by one rule."""

    def __init__(self, *, rule: Rule, **fields: Any) -> None:
        super().__init__(**fields)
        self._rule = rule
        self.extra_keyword_matches.add(rule.name)

    def runtest(self) -> None:
        assert isinstance(self.parent, ModelFile)
        report = self.parent.report()
        (checked,) = report.checked
        own = [finding for finding in report.findings if finding.code == self._rule.code]
        if not own and checked.rules == (UNREADABLE,):
            self._leave_to_unreadable(report.findings)
        grave = [finding for finding in own if finding.severity in ("error", "undetermined")]
        if grave:
            raise ModelFailure(self._described(own))
        if any(finding.severity == "warning" for finding in own):
            self.warn(ModelWarning(self._described(own)))
        elif own:
            self.add_report_section("call", "layerswap", self._described(own))

    def _leave_to_unreadable(self, findings: tuple[Finding, ...]) -> None:
        """One failure for a file that can't be read is enough, but there must be that one."""
        name = self.nodeid.removesuffix(self.name) + UNREADABLE
        if any(item.nodeid == name for item in self.session.items):
            pytest.skip("the file can't be read")
        raise ModelFailure(self._described(findings))

    def _described(self, findings: Iterable[Finding]) -> str:
        from layerswap.formats.results import explained

        assert isinstance(self.parent, ModelFile)
        return explained(self.parent.shown, findings)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        from layerswap.errors import LayerswapError

        if isinstance(excinfo.value, ModelFailure | ModelWarning | LayerswapError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self._rule.code} {self._rule.name}"
