"""The openai client's own tests against a deployment: a suite that nobody here wrote.

They check every answer's types strictly. Some cannot hold for a server that keeps nothing and
refuses by name what it does not serve; those must fail, and by a refusal.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from served import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REQUIREMENTS = Path(__file__).with_name("openai_suite.txt")
HELPERS = Path(__file__).parent.parent / "helpers"
MODELS = "[gpt-6-astra, gpt-3.5-turbo-instruct, model]"  # what the tests ask for

EVERYTHING = "with_all_params"  # every field at once, those that are refused by name among them
STORED = r"_(retrieve|update|list|delete|cancel|compact)(_|$)"  # needs answers that are kept
# File -> its tests that hold, and the names of those that cannot.
SUITE = {
    "chat/test_completions.py": (30, f"{EVERYTHING}|{STORED}"),
    "test_completions.py": (30, EVERYTHING),
    "test_models.py": (30, "_delete"),  # a model is not the caller's to delete
    "test_responses.py": (30, f"{EVERYTHING}|{STORED}"),
    "responses/test_input_tokens.py": (15, EVERYTHING),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with Served(log, "laptop_single", "--set", f"aliases={MODELS}") as served:
        yield served.url


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's sources and, beside them, the plugin that its tests need."""
    folder = tmp_path_factory.mktemp("openai")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--no-binary", "openai", "--require-hashes", "-r", REQUIREMENTS, "-d", folder],
        check=True,
        timeout=200,
    )
    (archive,) = folder.glob("openai-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def report(url: str, sources: Path) -> ElementTree.Element:
    """What became of the tests, as JUnit tells it."""
    (plugin,) = sources.glob("pytest_asyncio-*.whl")
    (root,) = (path for path in sources.glob("openai-*") if path.is_dir())
    written = sources / "report.xml"
    subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-o",
                "addopts=",
                "-q",
                "--tb=no",
                "--show-capture=no",
            ),
            *("-p", "missing_input", f"--junitxml={written}"),
            *(f"tests/api_resources/{file}" for file in SUITE),
        ],
        cwd=root,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
            "TEST_API_BASE_URL": f"{url}/v1",
            "PYTHONPATH": f"{plugin}{os.pathsep}{HELPERS}",
        },
        check=False,  # some must fail
        timeout=280,
    )
    return ElementTree.parse(written).getroot()


@pytest.mark.parametrize("file", SUITE)
def test_the_clients_own_tests_hold(report: ElementTree.Element, file: str) -> None:
    num_expected, cannot_hold = SUITE[file]
    module = "tests.api_resources." + file.removesuffix(".py").replace("/", ".")
    num_held = 0
    for case in report.iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        if case.get("classname", "").rpartition(".")[0] != module or "path_params" in name:
            continue  # another file's, or about the client alone
        failure = next((found for found in case if found.tag in ("failure", "error")), None)
        told = "" if failure is None else failure.get("message", "")
        if re.search(cannot_hold, name):
            assert re.search(r"Error code: 40[045]", told), f"{name}: {told or 'holds'}"
        else:
            assert failure is None, f"{name}: {told}"
            num_held += 1
    assert num_held == num_expected
