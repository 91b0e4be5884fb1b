"""Pages of the documentation that come from the code: keys, commands, and the map of files.

A hook of mkdocs (https://www.mkdocs.org/user-guide/configuration/#hooks).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic.fields import FieldInfo

from fedsp.cli import app
from fedsp.config import PartyConfig, RunConfig, Section
from fedsp.config_file import PRESETS

SOURCE = Path(__file__).parents[1] / "src" / "fedsp"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {"configuration": configuration(), "commands": commands(), "files": file_map()}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def configuration() -> str:
    """Every key of `run.toml` and `party.toml`."""
    lines = [
        "# Configuration",
        "",
        "`fedsp init` writes a `run.toml` with all keys, `fedsp federation init` a `party.toml` for"
        " each client. On the command line `section.key=value` sets a key.",
    ]
    for root, title in ((RunConfig, "run.toml"), (PartyConfig, "party.toml")):
        lines += ["", f"## {title}", "", *_table("", root)]
        for name, field in root.model_fields.items():
            if section := _section(field.annotation):
                about = " ".join((section.__doc__ or "").split())
                lines += ["", f"### [{name}]", "", about, "", *_table(name, section)]
    return "\n".join(lines) + "\n"


def _table(title: str, section: type[Section]) -> list[str]:
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_cell(_default(title, name, field))} |"
        f" {_cell(' '.join((field.description or '').split()))} |"
        for name, field in section.model_fields.items()
        if not _section(field.annotation)
    ]
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows]


def _section(annotation: Any) -> type[Section] | None:
    for choice in (annotation, *get_args(annotation)):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is list:
        return f"list of {' or '.join(map(_type, get_args(annotation)))}"
    if get_origin(annotation) is dict:
        return "table"
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "word"
    names = [_type(choice) for choice in choices] or [getattr(annotation, "__name__", "any")]
    return " or ".join(dict.fromkeys(name for name in names if name != "NoneType"))


def _default(section: str, key: str, field: FieldInfo) -> str:
    if not field.is_required():
        return "none" if field.default is None else f"`{field.default!r}`"
    by_preset = {
        name: preset[section].get(key) for name, preset in PRESETS.items() if section in preset
    }
    if None in by_preset.values() or not by_preset:
        return "required"
    return "; ".join(f"`{value!r}` ({name})" for name, value in by_preset.items())


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


def commands() -> str:
    """The help of every command."""
    root: Any = typer.main.get_command(app)
    lines = ["# Commands", "", " ".join(root.help.split())]
    for name, command in _commands(root, "fedsp"):
        lines += ["", f"## {name}", "", " ".join((command.help or "").split()), ""]
        rows = [_parameter(parameter) for parameter in command.params]
        if rows := [row for row in rows if row]:
            lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _commands(group: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        found += (
            _commands(command, f"{prefix} {name}") if below else [(f"{prefix} {name}", command)]
        )
    return found


def _parameter(parameter: Any) -> str:
    if parameter.name == "help":
        return ""
    name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
    default = "-" if parameter.default is None else f"`{parameter.default}`"
    return f"| `{name}` | {default} | {_cell(getattr(parameter, 'help', ''))} |"


def file_map() -> str:
    """Every module, with the first sentence of its docstring."""
    lines = ["# File map", "", "A chapter never imports a later one.", ""]
    order = ["", "data", "models", "training", "federation"]
    order += ["experiments", "deployment", "audit", "report"]
    for chapter in order:
        lines += [f"## {chapter + '/' if chapter else 'fedsp/'}", "", "| file | |", "|---|---|"]
        folder = SOURCE / chapter
        for path in sorted(folder.rglob("*.py") if chapter else folder.glob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            if path.name != "__init__.py" and text:
                first = " ".join(text.split("\n\n")[0].split())
                lines.append(f"| `{path.relative_to(folder)}` | {_cell(first)} |")
        lines.append("")
    return "\n".join(lines)
