"""Reading and writing a configuration: one TOML file, checked all at once, with a preset underneath.

A preset fills in what the file leaves out: `paper` is the paper and its authors' settings, `messenger` is our default. Both are the same
program with other numbers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsp.config import RunConfig, Section
from fedsp.errors import ConfigurationError, did_you_mean

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "auxiliary": {"plan": "shared(0)"},
        "distill": {"steps": 5000, "text": ["server"], "learning_rate": 5e-4},
        "prompt": {"space": "key_value", "length": 40, "init": "normal"},
        "round": {"rounds": 100},
        "client": {"align_steps": 10, "speak_steps": 10, "learning_rate": 5e-4, "weight_decay": 0.01, "keep_optimizer": True},
        "server": {"steps": 10, "learning_rate": 5e-4, "weight_decay": 0.01},
    },
    "messenger": {
        "auxiliary": {"plan": "ends(2)"},
        "distill": {"steps": 500, "text": [], "learning_rate": 1e-3},
        "prompt": {"space": "residual", "length": 16, "init": "text"},
        "round": {"rounds": 20},
        "client": {"align_steps": 0, "speak_steps": 5, "learning_rate": 3e-2, "weight_decay": 0.0, "keep_optimizer": False},
        "server": {"steps": 0, "learning_rate": 3e-2, "weight_decay": 0.0},
    },
}


def make_config(values: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """A checked configuration from nested values, the preset filled in underneath.

    Raises:
        ConfigurationError: every fault at once, one line each, with a suggestion for each unknown key.
    """
    preset = PRESETS.get(str(values.get("preset", "messenger")), {})
    filled: dict[str, Any] = {**{name: {} for name, field in RunConfig.model_fields.items() if field.is_required()}, **values}
    for section, defaults in preset.items():
        if isinstance(filled[section], Mapping):
            filled[section] = {**defaults, **filled[section]}
    try:
        return RunConfig.model_validate(filled)
    except ValidationError as error:
        lines = [f"  {_fault(dict(fault))}" for fault in error.errors()]
        raise ConfigurationError(f"{source} has {len(lines)} fault{'s' if len(lines) > 1 else ''}:\n" + "\n".join(lines)) from error


def read_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a TOML file; `overrides` are `section.key=value`, values as in TOML.

    File names that the file gives are taken from its own folder; those of overrides, and `output`, from the working directory.

    Raises:
        ConfigurationError: the file is missing or not TOML, or the configuration is at fault.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"there is no file {path}; `fedsp init {path}` writes one to start from") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"{path} is not a TOML file: {error}") from error
    _resolve_paths(values, path.parent.resolve())
    for override in overrides:
        apply_override(values, override)
    return make_config(values, str(path))


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in nested values; a value that is not TOML is taken as a string.

    Raises:
        ConfigurationError: there is no `=`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"{override!r} is not an override: write section.key=value, such as round.rounds=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigurationError(f"{override!r} is not an override: {section} is no section")
    values[name] = value


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the file names in `values` independent of the working directory: relative ones are taken from the configuration's folder."""

    def resolve(name: Any) -> Any:
        return str(folder / name) if isinstance(name, str) and name not in ("embedded", "server", "text", "normal") and (folder / name).exists() else name

    for section, key in [
        ("data", "train"),
        ("data", "validation"),
        ("data", "test"),
        ("model", "name"),
        ("auxiliary", "folder"),
        ("prompt", "init"),
        ("prompt", "init_text"),
    ]:
        table = values.get(section)
        if isinstance(table, dict) and key in table:
            table[key] = resolve(table[key])
    table = values.get("distill")
    if isinstance(table, dict) and isinstance(table.get("text"), list):
        table["text"] = [resolve(name) for name in table["text"]]


def _fault(fault: dict[str, Any]) -> str:
    where = [part for part in fault["loc"] if not (isinstance(part, str) and ("[" in part or part in ("str", "list")))]
    key = ".".join(str(part) for part in where)
    if fault["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in where[:-1]:
            section = section.model_fields[part].annotation
        return f"{key}: unknown key{did_you_mean(str(where[-1]), section.model_fields) or '; known here: ' + ', '.join(section.model_fields)}"
    if fault["type"] == "missing":
        return f"{key}: missing; {_description(where)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {fault['input']!r}" if key else message


def _description(where: list[Any]) -> str:
    section: Any = RunConfig
    for part in where[:-1]:
        section = section.model_fields[part].annotation
    return str(section.model_fields[where[-1]].description)


def template(preset: str) -> str:
    """A commented `run.toml` with every key, its default under the preset, and its description."""
    lines = ["# A fedsp run. Every key with its default; what is commented out has none.", ""]
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        if not (isinstance(section, type) and issubclass(section, Section)):
            lines.append(_template_line(name, preset if name == "preset" else field.default, field.description))
            continue
        lines += ["", f"[{name}]  # {(section.__doc__ or '').strip()}"]
        for key, inner in section.model_fields.items():
            default = PRESETS[preset].get(name, {}).get(key, None if inner.is_required() else inner.default)
            lines.append(_template_line(key, default, inner.description))
    return "\n".join(lines) + "\n"


def _template_line(key: str, value: Any, description: str | None) -> str:
    if value is None:
        return f"# {key} =   # {description}"
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"') if isinstance(value, str | list) else f"{value}"
    return f"{key} = {text}  # {description}"
