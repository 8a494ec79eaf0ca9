"""A small tokenizer and the prompts made with it, which no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_files import write_tokenizer

from ostro.cluster.prompt import PromptBuilder
from ostro.configs.reasoning import ReasoningConfig


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    return write_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def prompts(model_dir: Path) -> PromptBuilder:
    """Takes images, knows every effort."""
    return PromptBuilder(model_dir, ReasoningConfig())
