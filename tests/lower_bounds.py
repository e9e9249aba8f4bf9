"""Prints `name==bound` for every dependency and extra of pyproject.toml: a file of constraints.

    python tests/lower_bounds.py >bounds.txt && pip install '.[test]' --constraint bounds.txt

`make test-oldest` runs the tests with exactly these, so that the bounds are more than a guess.
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<bound>[\w.]+)(?P<marker>\s*;.*)?")


def lower_bounds(project):
    """The constraints of a `[project]` table, sorted; its extras of itself left out.

    Raises:
        ValueError: a requirement isn't a name with a lower bound alone.
    """
    extras = project.get("optional-dependencies", {}).values()
    constraints = set()
    for requirement in (*project["dependencies"], *(r for extra in extras for r in extra)):
        if requirement.startswith(f"{project['name']}["):
            continue
        match = REQUIREMENT.fullmatch(requirement)
        if match is None:
            raise ValueError(f"no lower bound alone: {requirement}")
        constraints.add(f"{match['name']}=={match['bound']}{match['marker'] or ''}")
    return sorted(constraints)


if __name__ == "__main__":
    print(*lower_bounds(tomllib.loads(PYPROJECT.read_text())["project"]), sep="\n")
