"""Requests made up from the OpenAPI document, and their answers held against it."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from ostro.cluster.openapi import document


def api(*, coverage: bool = False, paths: str = ".*") -> Any:
    """The document as schemathesis reads it.

    Args:
        coverage: Also try every bound and every kind of violation of each field, one by one.
        paths: A regular expression: these alone.
    """
    config = schemathesis.Config.from_dict({"phases": {"coverage": {"enabled": coverage}}})
    schema = schemathesis.openapi.from_dict(json.loads(document()), config=config)
    return schema.include(path_regex=paths)


def check(case: Any, url: str, model: str, *, excluded: tuple = (), **fields: object) -> Any:
    """Ask, and hold the answer against the document: status, headers, body, every event.

    Args:
        case: The request.
        url: The server.
        model: Its model, asked for instead of one made up.
        excluded: Checks not to make.
        fields: Set in every body that is an object.
    """
    if isinstance(case.body, dict):
        case.body |= fields
        if isinstance(case.body.get("model"), str):
            case.body["model"] = model
    if case.path_parameters.get("name") and case.meta and not case.meta.generation.mode.is_negative:
        case.path_parameters["name"] = model
    # No schema can say all that makes sense: what fits it may be refused.
    return case.call_and_validate(
        base_url=url, excluded_checks=[positive_data_acceptance, *excluded]
    )
