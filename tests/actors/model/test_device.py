"""Threads of a rank's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ostro.actors.model.device import num_threads
from ostro.configs.deployment import DeploymentConfig, EngineConfig, Layout, LayoutConfig

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
