"""What the checkpoint says the model is: shapes and constants, read from its config, never assumed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostro.configs.errors import ConfigError
