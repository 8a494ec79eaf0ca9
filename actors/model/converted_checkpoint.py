"""Write a conversion as a checkpoint directory: whole, checked, or not at all.

Everything is written beside the wanted directory, or within it if it is there, under a name that
says it is partial, held against its own config as a shard would do, and only then moved.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ostro.actors.errors import CheckpointError
from ostro.actors.model.checkpoint_writer import WriteProgress, write_shards
from ostro.actors.model.conversion import Conversion
from ostro.actors.model.weights import check_checkpoint
from ostro.configs.checkpoint_layout import CheckpointLayout, find_layout
from ostro.configs.config_writer import declare, write_config_values
from ostro.configs.model import ModelConfig, load_model_config
from ostro.configs.section import read_json

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE = "bfloat16"
_GENERATION = "generation_config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
_DTYPE_KEYS = ("dtype", "torch_dtype")
# Fields that a change of layout or precision may change; all others must survive it.
_MAY_DIFFER = ("architecture", "dtype", "quantization")


def write_conversion(
    conversion: Conversion,
    target: Path,
    *,
    progress: WriteProgress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the checkpoint.

    Args:
        conversion: From `plan_conversion`.
        target: The directory to make; it may be there if it is empty.
        progress: Told of the bytes of weights written; in the end they are `num_bytes`.
        max_shard_bytes: Larger checkpoints are cut, so that no file passes this.

    Raises:
        CheckpointError: The target holds something, it cannot be written or there is no room for
            it, the source changed or has a scale or a value that is not finite, or the wanted
            layout cannot say what the source's config says. Nothing is left then.
    """
    try:
        target = target.resolve()
        is_there = target.exists()
        if is_there and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(f"{target}: exists and is not empty; name a new directory")
        _check_room(conversion, target)
        # What is there already may be a disk of its own, to which nothing can be renamed.
        place = target if is_there else target.parent
        place.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=place))
        try:
            _write_checkpoint(conversion, partial, progress, max_shard_bytes)
            if is_there:
                _move_files(partial, target, conversion.layout)
            else:
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error


def _write_checkpoint(
    conversion: Conversion, partial: Path, progress: WriteProgress, max_shard_bytes: int
) -> None:
    partial.chmod(0o755)  # mkdtemp keeps others out
    _copy_other_files(conversion.source, partial)
    _write_configs(conversion, partial)
    write_shards(
        partial,
        conversion.layout.weights_stem,
        conversion.batches,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    check_checkpoint(partial)


def _move_files(partial: Path, target: Path, layout: CheckpointLayout) -> None:
    """Move everything, the config last: without it nobody takes the rest for a checkpoint."""
    for file in sorted(partial.iterdir(), key=lambda file: file.name == layout.config_name):
        file.rename(target / file.name)


def _check_room(conversion: Conversion, target: Path) -> None:
    place = next(path for path in (target, *target.parents) if path.is_dir())
    free_bytes, need_bytes = shutil.disk_usage(place).free, conversion.num_bytes()
    if free_bytes < need_bytes:
        raise CheckpointError(
            f"{target}: needs {need_bytes} bytes, but {place} has {free_bytes} free"
        )


def _copy_other_files(source: Path, partial: Path) -> None:
    """Tokenizer, templates, notes: every file that is neither weights nor the model's config.

    Folders stay behind: they hold downloads' caches, repositories' histories and more weights.
    """
    configs = {layout.config_name for layout in CheckpointLayout}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in configs and not _holds_weights(file):
            shutil.copyfile(file, partial / file.name)


def _holds_weights(file: Path) -> bool:
    return file.name.endswith(_WEIGHT_SUFFIXES)


def _write_configs(conversion: Conversion, partial: Path) -> None:
    config, layout = replace(conversion.config, dtype=_DTYPE), conversion.layout
    if find_layout(conversion.source) is layout:
        values = _adapted(read_json(conversion.source / layout.config_name), conversion)
    else:
        values = write_config_values(config, layout, conversion.quantization)
    _write_json(partial / layout.config_name, values)
    if not (partial / _GENERATION).exists():
        _write_json(partial / _GENERATION, _token_ids(config))
    written = load_model_config(partial)
    lost = [
        field.name
        for field in fields(ModelConfig)
        if field.name not in _MAY_DIFFER
        and getattr(written, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise CheckpointError(
            f"{conversion.source}: {layout.config_name} cannot say its {', '.join(lost)}; "
            f"keep the layout that it has"
        )


def _adapted(values: dict[str, Any], conversion: Conversion) -> dict[str, Any]:
    """The source's own config with another precision; all that we do not know stays in it."""
    sections = [values, *(values[key] for key in ("text_config",) if key in values)]
    for section in sections:
        section.update({key: _DTYPE for key in _DTYPE_KEYS if key in section})
    if conversion.quantization == conversion.config.quantization:
        return values
    for section in sections:
        for key in ("quantization", "quantization_config"):
            section.pop(key, None)
    return {**values, **declare(conversion.layout, conversion.quantization)}


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="ascii")
