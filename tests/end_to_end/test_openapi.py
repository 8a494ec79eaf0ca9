"""The OpenAPI document, true of a whole deployment and not only of its face."""

from __future__ import annotations

import documented
import hypothesis
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

API = documented.api()
SHORT = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4}


@API.parametrize()
@hypothesis.settings(max_examples=40, database=None)
def test_whatever_is_asked_is_answered_as_documented(case, served):
    limits = SHORT if "504" in case.operation.responses.status_codes else {}  # it generates
    documented.check(case, served.url, "ostro-teaching-7m", **limits)
