"""What every test starts from: an environment set before Ray, torch or a kernel is imported.

One torch thread per process, no network, and Ray as the product starts it: with a token, without
usage statistics, on side ports that two runs on one machine do not fight over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from ostro.cluster.ray_environment import prepare_environment

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.update(
    # Ranks of a test share the cores: two threads each were 20 times slower than one.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OMP_PROC_BIND="false",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)
os.environ.pop("RAY_ADDRESS", None)
prepare_environment()

# Shared cores make single examples slow; that is no finding.
hypothesis.settings.register_profile(
    "ostro", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("ostro"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "ostro")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A function that gives a TCP port nobody listens on; a new one at each call."""
    import free_port as ports

    return ports.free_port
