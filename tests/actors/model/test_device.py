"""Threads of a rank's process, and what its GPU cannot compute."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ostro.actors.model.device import check_fp8, num_threads
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig
from ostro.configs.errors import ConfigError
from ostro.configs.quantization import WeightFormat

_PROGRAM = """
import torch
from ostro.actors.model.device import prepare_device
from ostro.configs.deployment import DeploymentConfig, Layout, LayoutConfig
layout = LayoutConfig(layout=Layout.SINGLE, num_attention_shards=1, num_expert_shards=1)
prepare_device("cpu", DeploymentConfig(model="m", layout=layout))
print(torch.get_num_threads())
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to share out")
def test_a_lone_rank_keeps_all_its_threads_when_openmp_binds_them() -> None:
    bound = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "2")
    bound |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    told = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, **bound},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert told.stdout.split() == ["2"]


def test_ranks_that_share_the_cores_have_one_thread_each() -> None:
    layout = LayoutConfig(layout=Layout.SPLIT, num_attention_shards=1, num_expert_shards=2)
    assert num_threads(DeploymentConfig(model="m", layout=layout)) == 1
    chosen = EngineConfig(num_threads=3)
    assert num_threads(DeploymentConfig(model="m", layout=layout, engine=chosen)) == 3


def test_fp8_is_refused_by_name_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    plain, fp8_rows = EngineConfig(), EngineConfig(latent_cache_dtype="fp8")
    with pytest.raises(ConfigError, match=r"model: .* NVIDIA A100 .* --precision bf16"):
        check_fp8("cuda", plain, WeightFormat.FP8)
    with pytest.raises(ConfigError, match="latent_cache_dtype='fp8': NVIDIA A100"):
        check_fp8("cuda", fp8_rows, WeightFormat.NVFP4)
    check_fp8("cuda", plain, WeightFormat.NVFP4)
    check_fp8("cpu", fp8_rows, WeightFormat.PLAIN)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_fp8("cuda", fp8_rows, WeightFormat.FP8)
