"""The configuration of a run: one TOML file, checked all at once, every unit in its description.

A preset fills in what the file leaves out: `paper` is the paper and its authors' settings, `messenger` is our default. Both are the same
program with other numbers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedsp.errors import ConfigurationError, did_you_mean

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A table of the file: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The global model: it stays on the server."""

    name: str = Field(description="hub name or folder of a causal language model; 'embedded' is the small one that fedsp ships")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    positions: Literal["hugging_face", "from_zero"] = Field("hugging_face", description="hugging_face: tokens start at position P, as in PEFT and generate; from_zero: at 0, as in the authors' code")


class DataSection(Section):
    """The questions."""

    task: str = Field("multiple_choice", description="arc_easy, arc_challenge, openbookqa, hellaswag, piqa, sciq, race, webqs, or your own rows: multiple_choice, completion")
    train: str | None = Field(None, description="JSONL or CSV file, .gz too; none: the task's own data set on the Hugging Face hub")
    validation: str | None = Field(None, description="file of the server's validation questions; none: a share of train is held out")
    test: str | None = Field(None, description="file of test questions, for `fedsp evaluate` and the end of a run")
    holdout: Share = Field(0.1, description="share of train held out for validation, when there is no validation file")
    max_tokens: int | None = Field(None, ge=8, description="tokens; longer examples lose their oldest context; none: what the model allows")


class PartitionSection(Section):
    """Who holds which training questions."""

    clients: Count = Field(10, description="clients; 0: everything in one place, at the server; with kind = natural it is the column that says")
    kind: Literal["even", "dirichlet", "natural", "pathological"] = Field("even", description="even; dirichlet over a column; natural: one client per value of a column; pathological: few values of a column per client")
    column: str | None = Field(None, description="the column that dirichlet, natural and pathological go by")
    alpha: Rate = Field(0.5, description="concentration of dirichlet: small is uneven")
    values_per_client: Positive = Field(2, description="values of the column per client, for pathological")
    server_share: Share | None = Field(None, description="share of train that is the server's own; none: 1 / (clients + 1) where the server trains on it, else 0")


class AuxiliarySection(Section):
    """The small model that clients get, once."""

    plan: str | list[int] = Field(description="the global layer at each depth: shared(0), every(k), first(n), cells(0-1), ends(n, m), or a list such as [0, 0, 5, 5]")
    prompt_layers: list[int] | None = Field(None, description="the prompt layer that each depth reads; none: the plan's own map, printed by `fedsp plan`")
    folder: str | None = Field(None, description="an auxiliary model already made by `fedsp distill`; none: it is made at the start of the run")


class DistillSection(Section):
    """Fitting the auxiliary model to the global one."""

    steps: Count = Field(description="optimizer steps; 0: hand out the layers as they are")
    text: list[str] = Field(description="text files (.gz too), blank lines between passages; 'server' for the server's own examples")
    learning_rate: Rate = Field(description="of AdamW")
    weight_decay: Decay = Field(0.01, description="of AdamW")
    batch_size: Positive = Field(8, description="sequences per step")
    sequence_length: Positive = Field(128, description="tokens per sequence")
    sequences: Positive = Field(512, description="sequences at most; their teacher states are computed once and kept in memory")
    match_depths: Decay = Field(0.0, description="weight of the mean squared error at every depth; 0 is the paper")
    match_logits: Decay = Field(0.0, description="weight of the KL divergence of next-token distributions, nats; 0 is the paper")
    proxy_prompts: Decay = Field(0.0, description="scale of a random prompt put on both sides at each step; 0 is the paper; teacher states cannot be kept then")


class PromptSection(Section):
    """The soft prompt."""

    space: Literal["key_value", "residual"] = Field(description="key_value: keys and values travel; residual: inputs of each block travel, half the bytes")
    length: Positive = Field(description="virtual tokens")
    init: str = Field(description="text: activations of real text; normal: random; or a file that fedsp wrote")
    init_text: str | None = Field(None, description="file whose first tokens give the activations; none: the distillation text")
    init_scale: Rate = Field(0.02, description="standard deviation of init = normal")
    projection: Count = Field(0, description="hidden size of the projection MLP (the authors use 512); 0: none")


class RoundSection(Section):
    """The loop."""

    rounds: Positive = Field(description="rounds")
    clients: Count | None = Field(None, description="clients asked per round; none: all of them; 0: server only")
    min_clients: Count = Field(1, description="admitted updates that a round needs; with fewer the run stops and can be resumed")
    weighting: Literal["examples", "uniform"] = Field("examples", description="weights of the mean, from the server's register of examples")
    max_change: Rate = Field(1.0, description="root mean square by which a reply may differ from the broadcast prompt, per number")


class ClientSection(Section):
    """What an asked client does."""

    align_steps: Count = Field(description="stage 1, steps on its auxiliary model with the prompt frozen; 0: no alternating training")
    speak_steps: Count = Field(description="stage 2, steps on the prompt with the auxiliary model frozen")
    learning_rate: Rate = Field(description="of AdamW on the prompt")
    align_learning_rate: Rate = Field(5e-4, description="of AdamW on the auxiliary model")
    weight_decay: Decay = Field(description="of AdamW")
    batch_size: Positive = Field(16, description="examples per step")
    warmup: Share = Field(0.1, description="share of all steps of all rounds in which the learning rate rises; then it falls linearly to 0")
    keep_optimizer: bool = Field(description="whether AdamW's moments rest with the client between rounds; false: fresh each round")


class ServerSection(Section):
    """What the server does after aggregation, with its own labelled share."""

    steps: Count = Field(description="steps on the prompt through the global model; 0: none")
    learning_rate: Rate = Field(description="of AdamW on the prompt")
    weight_decay: Decay = Field(description="of AdamW")
    batch_size: Positive = Field(16, description="examples per step")


class ValidationSection(Section):
    """How the best prompt is chosen. Never by a test split."""

    by: Literal["server", "clients", "none"] = Field("server", description="server: loss through the global model; clients: through their auxiliary model on a tenth of their own examples; none: the last prompt is the result")
    examples: Positive = Field(300, description="validation questions used by the server, at most")
    every: Positive = Field(1, description="rounds between validations by the server")


class RunConfig(Section):
    """A whole run."""

    preset: Literal["messenger", "paper"] = Field("messenger", description="messenger: fedsp's default; paper: FedSP to the letter")
    seed: Count = Field(0, description="every draw of the run comes from it")
    output: str = Field("runs/latest", description="folder of the run")
    model: ModelSection
    data: DataSection
    partition: PartitionSection
    auxiliary: AuxiliarySection
    distill: DistillSection
    prompt: PromptSection
    round: RoundSection
    client: ClientSection
    server: ServerSection
    validation: ValidationSection

    @model_validator(mode="after")
    def _together(self) -> RunConfig:
        """What no section can see alone."""
        if self.partition.kind != "even" and not self.partition.column:
            raise ValueError(f"partition.column: partition.kind = {self.partition.kind!r} needs the name of a column")
        if self.distill.steps and not self.distill.text and not self.auxiliary.folder:
            raise ValueError("distill.text: distillation needs text; name public text files, or ['server'] for the server's own examples")
        if self.prompt.init == "text" and not self.prompt.init_text and not self.distill.text:
            raise ValueError("prompt.init_text: prompt.init = 'text' needs a text; name a file, or set distill.text, or prompt.init = 'normal'")
        if self.client.keep_optimizer and self.client.align_steps == 0 == self.client.speak_steps:
            raise ValueError("client.keep_optimizer: a client that takes no step has no optimizer to keep")
        return self

    @property
    def server_share(self) -> float:
        """The share of train that is the server's own."""
        if self.partition.server_share is not None:
            return self.partition.server_share
        if not self.partition.clients:
            return 1.0
        needed = self.server.steps > 0 or "server" in self.distill.text
        return 1 / (self.partition.clients + 1) if needed else 0.0


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
    """The configuration in a TOML file; `overrides` are `section.key=value`, values as in TOML. Paths are relative to the file.

    Raises:
        ConfigurationError: the file is missing or not TOML, or the configuration is at fault.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"there is no file {path}; `fedsp init {path}` writes one to start from") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigurationError(f"{path} is not a TOML file: {error}") from error
    _resolve_paths(values, path.parent)
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
    values[name] = value


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the file names in `values` independent of the working directory: relative ones are taken from the configuration's folder."""

    def resolve(name: Any) -> Any:
        return str(folder / name) if isinstance(name, str) and (folder / name).exists() else name

    for section, key in [("data", "train"), ("data", "validation"), ("data", "test"), ("model", "name"), ("auxiliary", "folder"), ("prompt", "init"), ("prompt", "init_text")]:
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
