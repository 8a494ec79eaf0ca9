"""Triton for every test of kernels: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: "cuda", or "cpu" in Triton's interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is a GPU, but this torch does not see it")
    import triton_interpreter

    triton_interpreter.repair()
    return "cpu"
