"""Reading and writing a configuration: one TOML file, checked all at once; that of a run has a
preset underneath.

A preset fills in what the file leaves out: `messenger` is our default, `prompt` our settings of a
soft prompt, `paper` those of the paper and its authors. All are one program with other numbers.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fedsp.config import DIGEST, NAME, MessengerSection, PartyConfig, RunConfig, Section
from fedsp.errors import ConfigurationError, did_you_mean, first_line
from fedsp.federation.aggregation.registry import require_rule
from fedsp.federation.methods.registry import find_method
from fedsp.models.messengers.registry import find_messenger, require_messenger

REGISTER = "register.toml"

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "auxiliary": {"plan": "shared(0)"},
        "distill": {"steps": 5000, "text": ["server"], "learning_rate": 5e-4},
        "prompt": {"space": "key_value", "length": 40, "init": "normal"},
        "round": {"rounds": 100},
        "client": {
            "auxiliary_steps": 10,
            "prompt_steps": 10,
            "learning_rate": 5e-4,
            "weight_decay": 0.01,
            "keep_optimizer": True,
        },
        "server": {"steps": 10, "learning_rate": 5e-4, "weight_decay": 0.01},
    },
    "prompt": {
        "auxiliary": {"plan": "ends(2)"},
        "distill": {"steps": 500, "text": ["model"], "learning_rate": 1e-3},
        "prompt": {"space": "residual", "length": 16, "init": "text"},
        "round": {"rounds": 20},
        "client": {
            "auxiliary_steps": 0,
            "prompt_steps": 5,
            "learning_rate": 3e-2,
            "weight_decay": 0.0,
            "keep_optimizer": False,
        },
        "server": {"steps": 0, "learning_rate": 3e-2, "weight_decay": 0.0},
    },
}
"""Defaults of keys, as a set; `docs/explanation/presets.md` compares them. `paper` holds the
paper's settings, `prompt` those that we found for a soft prompt, and `messenger`, below, what we
found to carry most to the global model."""
_RATE = find_messenger("adapter").learning_rate
PRESETS["messenger"] = {
    **PRESETS["prompt"],
    "auxiliary": {"plan": "emulator(1, 3)"},
    "messenger": {"kind": "adapter", "rank": 64, "alpha": 128.0, "train_first": True},
    "client": PRESETS["prompt"]["client"] | {"prompt_steps": 10, "learning_rate": _RATE},
    "server": PRESETS["prompt"]["server"] | {"learning_rate": _RATE},
}


PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "robust": {
        "aggregation": {
            "rule": "trimmed_mean",
            "malicious": 0.2,
            "mixing": True,
            "norm_bound": 2.0,
            "max_loss_rise": 0.05,
        },
        "round": {"weighting": "uniform"},
    },
    "dp-example": {
        "privacy": {"unit": "example", "epsilon": 8.0},
        "client": {"auxiliary_steps": 0, "batch_size": 32},
        "round": {"weighting": "uniform"},
    },
    "dp-client": {
        "privacy": {"unit": "client", "epsilon": 8.0},
        "round": {"weighting": "uniform", "min_clients": 0},
    },
}
"""Sets of protections, as keys: `docs/explanation/security.md` says what each one guarantees."""


def make_config(values: Mapping[str, Any], source: str = "the configuration") -> RunConfig:
    """A checked configuration from nested values, the profile filled in underneath, and the preset
    below that. A baseline has no messenger of its own choice: under the preset `messenger` it has
    the defaults of `prompt`.

    Raises:
        ConfigurationError: every fault at once, one line each, with a suggestion for each unknown
            key.
    """
    values, faults = _without_unknown_names(values)
    preset = _preset(values)
    profile = PROFILES.get(str(values.get("profile", "plain")), {})
    filled: dict[str, Any] = {
        **{name: {} for name, field in RunConfig.model_fields.items() if field.is_required()},
        **values,
    }
    for section in {**preset, **profile}:
        given = filled.get(section, {})
        if isinstance(given, Mapping):
            filled[section] = {**preset.get(section, {}), **profile.get(section, {}), **given}
            if "noise_multiplier" in given and "epsilon" not in given:
                filled[section].pop("epsilon", None)
    config = validated(RunConfig, filled, source, faults)
    try:
        _check_prompt(config, values)
        _check_messenger(config)
        _check_method(config)
    except (ValueError, ConfigurationError) as error:
        raise ConfigurationError(f"{source} has 1 fault:\n  {error}") from error
    return config.model_copy(update={"messenger": checked_options(config.messenger, source)})


def recorded_config(values: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration that a run wrote into its folder, whole and checked when it began: what an
    installed package brought to it, such as its messenger, need not be installed any more.

    Raises:
        ConfigurationError: as `validated`.
    """
    return validated(RunConfig, values, source)


def _without_unknown_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values without an aggregation rule or a messenger that nobody knows, so that other keys
    are not held against it, and what is to be said of each."""
    known, faults = dict(values), []
    for section, key, require in (
        ("aggregation", "rule", require_rule),
        ("messenger", "kind", find_messenger),
    ):
        given = values.get(section, {})
        name = given.get(key) if isinstance(given, Mapping) else None
        if isinstance(name, str):
            try:
                require(name)
            except ConfigurationError as error:
                faults.append(str(error))
                known[section] = {other: given[other] for other in given if other != key}
    return known, faults


def _preset(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The defaults that the preset of a configuration gives it."""
    name = str(values.get("preset", "messenger"))
    if name != "messenger":
        return PRESETS.get(name, PRESETS["messenger"])  # of a wrong name, so that it alone is said
    with suppress(ConfigurationError):  # that is said later
        if not find_method(str(values.get("method", "fedsp"))).deployable:
            return PRESETS["prompt"]
    own, given = PRESETS["messenger"], values.get("messenger", {})
    kind = given.get("kind") if isinstance(given, Mapping) else None
    if not isinstance(kind, str):
        return own
    rate = {"learning_rate": find_messenger(kind).learning_rate}
    return {**own, "client": own["client"] | rate, "server": own["server"] | rate}


def _check_prompt(config: RunConfig, values: Mapping[str, Any]) -> None:
    """Raises ValueError where a soft prompt is described, and only the preset says that none
    travels."""
    chosen = "kind" in values.get("messenger", {})
    if values.get("prompt") and not chosen and config.messenger.kind == "adapter":
        raise ValueError(
            f"prompt.{next(iter(values['prompt']))}: by default adapters travel and no soft prompt;"
            " set preset = 'prompt', or messenger.kind, or leave [prompt] out"
        )


def _check_messenger(config: RunConfig) -> None:
    """Raises ValueError for what the messenger of a run cannot do."""
    kind, distill = config.messenger.kind, config.distill
    private = config.privacy.unit == "example"
    entry = require_messenger(kind, layers=config.messenger.layers, private=private)
    inexact = {
        "model.precision": config.model.precision not in ("auto", "float32"),
        "auxiliary.precision": config.auxiliary.precision != "float32",
    }
    if entry.trains_weights and (key := next((key for key in inexact if inexact[key]), None)):
        raise ValueError(
            f"{key}: messenger.kind = {kind!r} trains the model's own layers, in float32; set it to"
            " float32"
        )
    from_text = entry.has_prompt and config.prompt.init == "text"
    if from_text and not config.prompt.init_text and not distill.text:
        raise ValueError(
            "prompt.init_text: prompt.init = 'text' needs a text; name a file, or set"
            " distill.text, or prompt.init = 'normal'"
        )


def checked_options(section: MessengerSection, source: str) -> MessengerSection:
    """The section with all keys of `messenger.options`, as the messenger's own class has them.

    Raises:
        ConfigurationError: there are some, and it has none; its class is no Section; or as
            `validated`, `find_messenger`.
    """
    keys = find_messenger(section.kind).options
    if keys is None:
        if section.options:
            raise ConfigurationError(
                f"{source} has 1 fault:\n  messenger.options: {section.kind!r} has no keys of its"
                " own: leave it out"
            )
        return section
    if not (isinstance(keys, type) and issubclass(keys, Section)):
        raise ConfigurationError(
            f"messenger.kind: the options of {section.kind!r} are {keys!r}, which is no subclass of"
            " fedsp.config.Section"
        )
    checked = validated(keys, section.options, f"{source}, [messenger.options],")
    return section.model_copy(update={"options": checked.model_dump(exclude_none=True)})


def makes_package(config: RunConfig) -> bool:
    """Whether a run makes the package of its clients itself: its method has one, there are clients
    to have it, and no folder of one is named."""
    has_one = find_method(config.method).package and config.asks_clients
    return has_one and not config.auxiliary.folder


def trains_weights(config: RunConfig) -> bool:
    """Whether a run trains weights of the model itself, which must then be float32."""
    kind = find_messenger(config.messenger.kind)
    return find_method(config.method).trains_weights or kind.trains_weights


def _check_method(config: RunConfig) -> None:
    """Raises ValueError for what the method of a run cannot do."""
    entry, model, auxiliary = find_method(config.method), config.model, config.auxiliary
    only_deployable = {
        "federation": config.federation is not None,
        "client.auxiliary_steps": config.client.auxiliary_steps > 0,
        "privacy.unit": config.privacy.unit == "example",
        "auxiliary.precision": auxiliary.precision != "float32",
        "messenger.kind": config.messenger.kind != "prompt",
    }
    if not entry.deployable and (
        key := next((key for key, given in only_deployable.items() if given), None)
    ):
        raise ValueError(f"{key}: needs method = 'fedsp', but method is {config.method!r}")
    if config.method == "fedprompt_single" and config.prompt.space == "input":
        raise ValueError(
            "prompt.space: fedprompt_single tunes the prompt of one layer, not 'input'"
        )
    if not entry.federated and entry.rounds and config.asks_clients:
        raise ValueError(
            f"partition.clients: {config.method} has all text in one place; set it to 0, or use"
            " method = 'fedprompt'"
        )
    for key, value, inexact in (
        ("model.precision", model.precision, model.precision in ("8bit", "4bit")),
        ("model.device", model.device, model.device == "split"),
    ):
        if inexact and entry.exact_weights:
            raise ValueError(
                f"{key}: method = {config.method!r} needs unquantized weights on one device, not"
                f" {value!r}; set it to auto"
            )
        if inexact and makes_package(config):
            raise ValueError(
                f"{key}: an auxiliary model cannot be built from a {value!r} model; build it first"
                " with `fedsp distill`, which loads the full model, and set auxiliary.folder to it"
            )
    if model.precision == "bfloat16" and entry.trains_weights:
        raise ValueError(
            f"model.precision: method = {config.method!r} trains the weights, in float32; set it to"
            " auto or float32"
        )


Root = TypeVar("Root", bound=Section)


def validated(
    root: type[Root], values: Mapping[str, Any], source: str, faults: Sequence[str] = ()
) -> Root:
    """A checked configuration of any kind; `faults` were found in it before.

    Raises:
        ConfigurationError: every fault at once, one line each, with a suggestion for each unknown
            key.
    """
    lines, cause = list(faults), None
    try:
        config = root.model_validate(values)
    except ValidationError as error:
        lines += [_fault(root, dict(fault)) for fault in _alternatives(error)]
        cause = error
    if lines:
        raise ConfigurationError(
            f"{source} has {len(lines)} fault{'s' if len(lines) > 1 else ''}:\n"
            + "\n".join(f"  {line}" for line in lines)
        ) from cause
    return config


def read_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a TOML file; `overrides` are `section.key=value`, values as in TOML.

    File names that the file gives are taken from its own folder; those of overrides, and `output`,
    from the working directory.

    Raises:
        ConfigurationError: the file is missing or not TOML, or the configuration is at fault.
    """
    values = read_toml(path, f"`fedsp init {path}` writes one to start from")
    resolve_paths(values, path.parent.resolve())
    for override in overrides:
        apply_override(values, override)
    resolve_from_here(values)
    return make_config(values, str(path))


def read_party(path: Path, *, package_known: bool = True) -> PartyConfig:
    """The configuration of a client in a deployment; its file names are taken from the file's own
    folder. Without `package_known` the package's digest is not read: it may not be known yet.

    Raises:
        ConfigurationError: the file is missing or not TOML, or the configuration is at fault.
    """
    values = read_toml(path, "`fedsp federation init` and `fedsp party init` write one")
    if not package_known:
        values = {**values, "package": {"sha256": "0" * 64}}
    party = validated(PartyConfig, values, str(path))
    folder = path.parent.resolve()
    data = party.data.model_copy(update={"train": str(folder / party.data.train)})
    package = party.package.model_copy(update={"folder": str(folder / party.package.folder)})
    own = {"keys": str(folder / party.keys), "state": str(folder / party.state)}
    return party.model_copy(update={**own, "data": data, "package": package})


@dataclass(frozen=True)
class Member:
    """A client in the server's register: its public key, its number of examples (its weight in the
    mean); with a self-managed SuperLink, the node ID that the key is registered under; and what it
    has said of its text, for the model card."""

    public_key: Path
    examples: int
    node: int | None = None
    about: str | None = None


def read_register(folder: Path) -> dict[str, Member]:
    """The clients that a server knows, by name.

    Raises:
        ConfigurationError: the register is missing or names none, or an entry has no public key or
            no number of examples.
    """
    register = read_members(folder)
    if not register:
        raise ConfigurationError(
            f"{folder / REGISTER} names no client: `fedsp federation admit` enters one's request"
        )
    return register


def read_members(folder: Path) -> dict[str, Member]:
    """`read_register`, of which no client need be in the register yet.

    Raises:
        ConfigurationError: the register is missing, or an entry has no public key or no number of
            examples.
    """
    path = folder / REGISTER
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("clients", {})
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"federation.folder: there is no register {path}; `fedsp federation init` writes one"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigurationError(f"{path} is not a TOML file: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigurationError(
            f"{path}: clients is no table; write one [clients.NAME] table for each client"
        )
    register: dict[str, Member] = {}
    for name, entry in entries.items():
        where = f"{path}, client {name!r}"
        if not isinstance(entry, dict) or set(entry) - {"node", "about"} != {
            "public_key",
            "examples",
        }:
            raise ConfigurationError(f"{where}: expected exactly public_key and examples")
        key, examples = folder / str(entry["public_key"]), entry["examples"]
        if not isinstance(examples, int) or examples < 1:
            raise ConfigurationError(
                f"{where}: examples is {examples!r}, expected a whole number of at least 1"
            )
        if not key.is_file():
            raise ConfigurationError(f"{where}: there is no public key {key}")
        about = entry.get("about")
        if about is not None and not isinstance(about, str):
            raise ConfigurationError(f"{where}: about is {about!r}, expected a text")
        register[name] = Member(key, examples, entry.get("node"), about)
    return register


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """The values in a TOML file; `remedy` says what to do where there is none.

    Raises:
        ConfigurationError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"there is no file {path}; {remedy}") from error
    except RecursionError as error:
        raise ConfigurationError(
            f"{path} is not a TOML file that can be read: it is nested too deeply"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read as a TOML file: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is not a TOML file: it is not UTF-8; save it as UTF-8"
        ) from error
    except ValueError as error:
        why = first_line(error)
        windows = "hex value" in why or "escape" in why.lower()
        meant = "; write a Windows path with / or in single quotes" if windows else ""
        if "twice" in why:
            meant = "; a section stands once, with all of its keys below it"
        raise ConfigurationError(f"{path} is not a TOML file: {why}{meant}") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in nested values; a value that is not TOML is taken as a string.

    Raises:
        ConfigurationError: there is no `=`.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigurationError(
            f"{override!r} is not an override: write section.key=value, such as round.rounds=5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *sections, name = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigurationError(f"{override!r} is not an override: {section} is not a section")
    values[name] = value


def resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the file names in `values` independent of the working directory: relative ones are taken
    from the configuration's folder."""

    def resolve(name: Any) -> Any:
        special = name in ("embedded", "text", "normal", "")
        # os.path.exists, unlike Path.exists, is False for a text that cannot be a file name
        there = isinstance(name, str) and not special and os.path.exists(folder / name)  # noqa: PTH110
        return str(folder / name) if there else name

    for section, key in [
        ("data", "train"),
        ("data", "validation"),
        ("data", "test"),
        ("model", "name"),
        ("auxiliary", "folder"),
        ("federation", "folder"),
        ("prompt", "init"),
        ("prompt", "init_text"),
    ]:
        table = values.get(section)
        if isinstance(table, dict) and key in table:
            table[key] = resolve(table[key])
    table = values.get("distill")
    if isinstance(table, dict) and isinstance(table.get("text"), list):
        table["text"] = [
            name if name in ("server", "model") else resolve(name) for name in table["text"]
        ]


def resolve_from_here(values: dict[str, Any]) -> None:
    """The same with the working folder; where that is gone, names stay as they are."""
    with suppress(FileNotFoundError):
        resolve_paths(values, Path.cwd())


EXPECTED = {
    "model_type": "a table of keys",
    "dict_type": "a table of keys",
    "list_type": "a list",
    "string_type": "a text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is not infinite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}
"""What was expected where pydantic finds a fault, by its kind."""
FORMS = {
    NAME: "up to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
    DIGEST: "a SHA-256 digest, 64 digits and letters from a to f",
}
"""The patterns of texts, in words."""


def _alternatives(error: ValidationError) -> list[dict[str, Any]]:
    """Pydantic's faults, those of one key that takes several kinds of value as one."""
    faults: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found in error.errors():
        # the last part is a key, whatever it says, where one is unknown or missing
        own = 1 if found["type"] in ("extra_forbidden", "missing") else 0
        places = found["loc"][: len(found["loc"]) - own]
        where = (*_where(places), *found["loc"][len(places) :])
        fault: dict[str, Any] = {**found, "loc": where}
        wanted = EXPECTED.get(fault["type"])
        if wanted:
            fault["msg"] = f"expected {wanted.format(**fault.get('ctx', {}))}"
        before = faults.get(fault["loc"])
        if before and wanted and before["type"] in EXPECTED:
            before["msg"] += f" or {fault['msg'].removeprefix('expected ')}"
        else:
            # a fault of another kind at the same place keeps a line of its own
            faults[fault["loc"] if not before else (*fault["loc"], len(faults))] = fault
    return list(faults.values())


def _where(places: Iterable[Any]) -> list[Any]:
    return [
        part
        for part in places
        if not (isinstance(part, str) and ("[" in part or part in ("str", "list")))
    ]


def _fault(root: type[Section], fault: dict[str, Any]) -> str:
    where = list(fault["loc"])
    key = ".".join(str(part) for part in where)
    if fault["type"] == "extra_forbidden":
        known = _section(root, where[:-1]).model_fields
        return (
            f"{key}: unknown"
            f" key{did_you_mean(str(where[-1]), known) or '; known here: ' + ', '.join(known)}"
        )
    if fault["type"] == "missing":
        field = _section(root, where[:-1]).model_fields[where[-1]]
        table = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        nothing_said = "a section of the file" if table else "it has no default"
        return f"{key}: missing; {_on_one_line(field.description) or nothing_said}"
    message = fault["msg"].removeprefix("Value error, ")
    meant = ""
    if fault["type"] == "string_pattern_mismatch":
        form = FORMS.get(fault["ctx"]["pattern"], f"a text of the form {fault['ctx']['pattern']}")
        message = f"expected {form}"
    if fault["type"] == "literal_error":
        meant = did_you_mean(str(fault["input"]), re.findall("'([^']+)'", fault["ctx"]["expected"]))
    of_section = fault["type"] == "value_error" and isinstance(fault["input"], Mapping)
    return message if of_section else f"{key}: {message}, not {fault['input']!r}{meant}"


def _section(root: type[Section], path: list[Any]) -> type[Section]:
    """The section that a path of keys leads to; an optional one counts as the section it may be."""
    for part in path:
        annotation: Any = root.model_fields[part].annotation
        root = next(
            (choice for choice in get_args(annotation) if choice is not type(None)), annotation
        )
    return root


def template(preset: str) -> str:
    """A commented `run.toml` with every key of a run in one place, its default under the preset,
    and its description."""
    return template_of(RunConfig, {"preset": preset}, "A fedsp run.", PRESETS[preset])


def template_of(
    root: type[Section],
    values: Mapping[str, Any],
    title: str,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """A commented TOML file with every key of a configuration: those in `values` are set, all
    others are commented out and show their default, from `defaults` (of a preset) if given there.
    Commented keys do not override a preset or profile. Optional sections appear if in `values`."""
    filled = defaults or {}
    about = "Behind a # stands every other key with its default: take the # away to set one."
    lines = [f"# {title} {about}", ""]
    for name, field in root.model_fields.items():
        section: Any = _section(root, [name])
        if not (isinstance(section, type) and issubclass(section, Section)):
            lines.append(_template_line(name, values, filled, field))
            continue
        if field.default is None and name not in values:
            continue
        lines += ["", f"[{name}]  # {_on_one_line(section.__doc__)}"]
        lines += [
            _template_line(key, values.get(name, {}), filled.get(name, {}), inner)
            for key, inner in section.model_fields.items()
        ]
    return "\n".join(lines) + "\n"


def _template_line(
    key: str, values: Mapping[str, Any], defaults: Mapping[str, Any], field: FieldInfo
) -> str:
    value = values.get(key, defaults.get(key, None if field.is_required() else field.default))
    text = "" if value is None else json.dumps(value, ensure_ascii=False)
    about = _on_one_line(field.description)
    return f"{'' if key in values else '# '}{key} = {text}  # {about}"


def _on_one_line(text: str | None) -> str:
    return " ".join((text or "").split())
