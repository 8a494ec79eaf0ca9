"""Drafts in real cells: the same answers from every layout, in fewer steps."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from local_cell import LocalCell, ProcessPool, local_cell

from ostro.actors.engine.request import GenerationRequest, SamplingParams, StopParams, TokenEvent
from ostro.cluster.cli_deployment import model_directory
from ostro.configs.deployment import (
    DeploymentConfig,
    DispatchMode,
    EngineConfig,
    Layout,
    LayoutConfig,
)
from ostro.configs.speculation import DraftMethod, SpeculationConfig
