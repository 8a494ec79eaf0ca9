"""One deployment of the default preset with the embedded model, for all who only ask it things.

It takes longer to start than most of its tests take. A test that needs settings of its own, that
breaks something, or that reads what was counted starts another.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import openai
import pytest
from local_cell import ProcessPool
from served import Served

from ostro.protos import generation_pb2_grpc


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Ready, and not to be changed."""
    with Served(tmp_path_factory.mktemp("log") / "serve.log") as served:
        yield served


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[openai.OpenAI]:
    """Refuses answers that do not fit its types."""
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="session")
def stub(served: Served) -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    """Calls it over gRPC."""
    with grpc.insecure_channel(served.grpc_address) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    """Processes of ranks; a module's tests build their cells from the same ones."""
    pool = ProcessPool()
    yield pool
    pool.close()
