"""YAML to `DeploymentConfig` and back: strict, and every error names the path of the field.

What a file leaves out keeps the default of its field, also inside the effort table.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ostro.configs.deployment import DeploymentConfig
from ostro.configs.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_D = TypeVar("_D", bound="DataclassInstance")
_PRESETS = Path(__file__).parent / "presets"
MODEL_FILE = "ostro.yaml"
_MODEL_KEYS = ("served_name", "notice", "reasoning")
# Stands in for the rest of a deployment while a checkpoint's own part of it is checked.
_ANY_DEPLOYMENT = {
    "model": "any",
    "layout": {"layout": "single", "num_attention_shards": 1, "num_expert_shards": 1},
}


def preset_names() -> list[str]:
    """The presets that come with Ostro, sorted."""
    return sorted(file.stem for file in _PRESETS.glob("*.yaml"))


def load_deployment(
    source: str | Path,
    overrides: Sequence[str] = (),
    model_defaults: Mapping[str, Any] | None = None,
) -> DeploymentConfig:
    """Read a deployment.

    Args:
        source: A preset's name, or a YAML file.
        overrides: Changes as "key.path=value", the value in YAML; later ones win.
        model_defaults: From `read_model_defaults`; fill what neither file nor overrides name.

    Raises:
        ConfigError: No such preset or file, an unknown key, a value of the wrong type or out of
            range; the text names the source and the dotted path.

    Example:
        load_deployment("laptop", ["layout.num_expert_shards=3", "model=/models/small4"])
    """
    file = _find(source)
    values = read_yaml(file)
    for override in overrides:
        _apply(values, override)
    values = _filled(values, model_defaults or {})
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def read_model_defaults(model_dir: Path) -> dict[str, Any]:
    """What a checkpoint's own `ostro.yaml` says of how to serve it; empty if it brings none.

    Raises:
        ConfigError: The file is no YAML mapping, or names what is not the checkpoint's to decide.
    """
    file = model_dir / MODEL_FILE
    if not file.is_file():
        return {}
    values = read_yaml(file)
    for key in values:
        if key not in _MODEL_KEYS:
            raise ConfigError(f"{file}: {key}: a checkpoint may set {', '.join(_MODEL_KEYS)} only")
    try:
        from_dict({**_ANY_DEPLOYMENT, **values})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return values


def from_dict(values: dict[str, Any]) -> DeploymentConfig:
    """Build a deployment from plain values; the inverse of `to_dict`.

    Raises:
        ConfigError: As `load_deployment`.
    """
    return _build_dataclass(DeploymentConfig, values, MISSING, "")


def to_dict(config: DeploymentConfig) -> dict[str, Any]:
    """Plain values (mappings, lists, strings, numbers, None) that YAML and JSON can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _find(source: str | Path) -> Path:
    if str(source) in preset_names():
        return _PRESETS / f"{source}.yaml"
    if Path(source).is_file():
        return Path(source)
    raise ConfigError(
        f"{source}: neither a file nor a preset{_hint(str(source), preset_names())}; "
        f"presets are {', '.join(preset_names())}"
    )


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice, and whose every error is a YAMLError."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001  # PyYAML's signature
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: FBT001  # likewise
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError):  # of a thirteenth month, or `!!int abc`
            what = f"{str(node.value)[:100]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: It cannot be read, is no YAML, holds something else, or a key stands twice.
    """
    try:
        values = _parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: must hold a mapping, not {type(values).__name__}")
    return values


def _filled(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values, and what only the defaults have, also inside mappings of both."""
    filled = {**defaults, **values}
    for key, default in defaults.items():
        value = filled[key]
        if isinstance(default, dict) and isinstance(value, dict):
            filled[key] = _filled(value, default)
    return filled


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one "key.path=value" in place."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: must read key.path=value")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is no YAML: {error}") from error
    for i, key in enumerate(keys[:-1]):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: i + 1])} is no mapping")
    values[keys[-1]] = value


def _build(wanted: Any, value: Any, default: Any, path: str) -> Any:
    """Turn a YAML value into the wanted type; `default` fills what a mapping leaves out."""
    if is_dataclass(wanted) and isinstance(wanted, type):
        return _build_dataclass(wanted, value, default, path)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _build(inner, value, MISSING if default is None else default, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}={value!r}: must be a list")
        items = enumerate(value)
        return tuple(_build(arguments[0], item, MISSING, f"{path}[{i}]") for i, item in items)
    if origin is dict:
        _check_mapping(value, path)
        known = {} if default is MISSING else default
        _check_keys(value, known or value, path)
        built = {
            key: _build(arguments[1], item, known.get(key, MISSING), _join(path, key))
            for key, item in value.items()
        }
        return {**known, **built}
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return _build_enum(wanted, value, path)
    return _build_scalar(wanted, value, path)


def _build_dataclass(wanted: type[_D], value: Any, default: Any, path: str) -> _D:
    _check_mapping(value, path)
    known = {field.name: field for field in fields(wanted)}
    _check_keys(value, known, path)
    hints = get_type_hints(wanted)
    arguments = {}
    for name, field in known.items():
        fallback = _default_of(field) if default is MISSING else getattr(default, name)
        if name in value:
            arguments[name] = _build(hints[name], value[name], fallback, _join(path, name))
        elif fallback is MISSING:
            raise ConfigError(f"{_join(path, name)}: missing")
        else:
            arguments[name] = fallback
    try:
        return wanted(**arguments)
    except ConfigError as error:
        raise ConfigError(_join(path, str(error))) from error


def _default_of(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _build_enum(wanted: type[Enum], value: Any, path: str) -> Enum:
    try:
        return wanted(value)
    except ValueError:
        allowed = [member.value for member in wanted]
        raise ConfigError(f"{path}={value!r}: must be one of {allowed}") from None


def _build_scalar(wanted: Any, value: Any, path: str) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[
            wanted
        ]
        raise ConfigError(f"{path}={value!r}: must be {name}")
    return value


def _check_mapping(value: Any, path: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'deployment'}={value!r}: must be a mapping")


def _check_keys(value: dict[str, Any], known: Collection[str], path: str) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"{_join(path, key)}: unknown key{_hint(str(key), known)}")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _hint(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=3)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value
