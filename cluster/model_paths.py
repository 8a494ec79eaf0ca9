"""Where the checkpoints lie that a deployment names: its model's, and its draft head's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ostro.configs.deployment import EngineConfig
from ostro.configs.speculation import DraftMethod

EMBEDDED = "embedded"
_TEACHING_MODEL = Path(__file__).parent / "teaching_model"
_HEAD_FOLDER = "eagle"


def resolve_model(model: str) -> Path:
    """The checkpoint directory that a deployment names; "embedded" is the one that ships here."""
    return _TEACHING_MODEL if model == EMBEDDED else Path(model).expanduser().absolute()


def head_beside(model_dir: Path) -> Path | None:
    """The draft head that a checkpoint brings: its folder `eagle`, if it has one."""
    head = model_dir / _HEAD_FOLDER
    return head if head.is_dir() else None


def settle_drafts(engine: EngineConfig, model_dir: Path) -> EngineConfig:
    """The same with what is drafted settled for one model.

    `auto` becomes `eagle` with the head beside the model, or nothing where there is none; a head's
    path becomes whole, and "embedded" is the one of the embedded model. Settled twice, it stays.
    """
    speculation = engine.speculation
    if speculation is None or speculation.method is DraftMethod.NGRAM:
        return engine
    if speculation.draft_model is None:
        head = head_beside(model_dir)
    elif speculation.draft_model == EMBEDDED:
        head = _TEACHING_MODEL / _HEAD_FOLDER
    else:
        head = resolve_model(speculation.draft_model)
    if head is None:
        return replace(engine, speculation=None)
    settled = replace(speculation, method=DraftMethod.EAGLE, draft_model=str(head))
    return replace(engine, speculation=settled)
