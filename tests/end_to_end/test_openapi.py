"""The OpenAPI document, true of a whole deployment and not only of its face."""

from __future__ import annotations

from collections.abc import Iterator

import documented
import hypothesis
import pytest
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

API = documented.api()
SHORT = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("log") / "serve.log")
    try:
        served.wait_ready()
        yield served
    finally:
        served.stop()


@API.parametrize()
@hypothesis.settings(max_examples=40, database=None)
def test_whatever_is_asked_is_answered_as_documented(case, served):
    limits = SHORT if "504" in case.operation.responses.status_codes else {}  # it generates
    documented.check(case, served.url, "ostro-teaching-7m", **limits)
