"""The run directory: configuration, progress and results of one run. A run that was killed at any
point can be resumed from it.

config.toml          the resolved configuration; `fedsp run config.toml` repeats the run
run.json             identity, seed, threads, versions
partition.json       who holds which rows of train
inputs.json          digests of all that the run reads: rows, public text, models
auxiliary/           the folder that clients get
rounds.jsonl         one line per round, and one where clients judge the last one
seconds.json         what all starts took, and the distillation
traffic.jsonl        one line per message to or from another process, if there was one
flower/              what Flower's processes wrote, in a deployment
prompts/             the prompt that stood after each round
best.safetensors     the best prompt by validation, as the global model reads it (weights, where a
                     baseline tunes those)
checkpoint/          the last two states
lock                 held by the process that runs it
state/               what the parties keep between rounds
privacy.jsonl        the ledger of client-level privacy, written before each release
privacy_statement.json   the privacy guarantee: epsilon, delta, unit, and what is not covered
result.json          figures at the end
scores.jsonl         what each test question got
NAME.json            what `fedsp audit --only NAME` measured: disclosure, model, membership,
                     inversion, epsilon, depths
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import secrets
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import tomli_w

from fedsp.config import RunConfig
from fedsp.config_file import make_config, recorded_config, resolve_from_here
from fedsp.errors import FedspError, RunError, StorageError
from fedsp.federation.methods.registry import shown_method
from fedsp.storage import locked, parse_json, read_tensors, write_bytes, write_json, write_tensors

if TYPE_CHECKING:
    from fedsp.federation.loop import RunState
    from fedsp.federation.messages import RoundRecord
    from fedsp.federation.state_store import StateStore
    from fedsp.models.payload import Payload
    from fedsp.models.soft_prompt import PromptSpec

CONFIG, RUN, LOCK = "config.toml", "run.json", "lock"
RESULT, BEST = "result.json", "best.safetensors"
STATEMENT = "privacy_statement.json"
PARTITION, INPUTS, SECONDS = "partition.json", "inputs.json", "seconds.json"
ROUNDS, TRAFFIC, SCORES = "rounds.jsonl", "traffic.jsonl", "scores.jsonl"
RECORDED = (
    *("round", "asked", "answered", "failed", "bytes_down", "bytes_up"),
    *("validation", "best_round", "seconds"),
)
"""What every line of ROUNDS has at least."""
PROXY_COUNTS = "proxy.jsonl"
LONGEST_NAME = 200
"""Of a folder that is named after a party: file systems take 255 bytes."""


class RunDirectory:
    """A run on disk. Made by `create` or `open`."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self.auxiliary = path / "auxiliary"
        self.best = path / BEST

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """A new run in `config.output`.

        Raises:
            RunError: the folder holds a run, or something else.
            StorageError: the disk did not take it.
        """
        cls.require_free(config)
        path = Path(config.output)
        import torch

        run = cls(path, config)
        about = {
            "run": secrets.token_hex(8),  # no draw comes from it; clients tell runs apart by it
            "seed": config.seed,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        write_json(path / RUN, about)
        write_bytes(path / CONFIG, tomli_w.dumps(config.model_dump(exclude_none=True)).encode())
        return run

    @classmethod
    def require_free(cls, config: RunConfig) -> None:
        """See that a new run may be written into `config.output`.

        Raises:
            RunError: the folder holds a run, or something else.
        """
        path = Path(config.output)
        there = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        begun = there - {CONFIG, RUN, LOCK}
        if begun and CONFIG in there:
            other = cls.open(path)
            differing = differing_keys(config, other.config)
            summary = (
                f"a run of another configuration ({', '.join(differing)}"
                f" differ{'s' if len(differing) == 1 else ''})"
                if differing
                else "this very run, finished"
                if other.finished
                else "this very run, unfinished"
            )
            command = "serve" if config.federation else "run"
            unfinished = not differing and not other.finished
            resume = f"resume it with `fedsp {command} --resume {path}`, or " if unfinished else ""
            raise RunError(f"{path} holds {summary}: {resume}give another folder with output=...")
        if begun or (path.exists() and not path.is_dir()):
            raise RunError(
                f"{path} is in use and does not hold a run: give an empty or a new folder with"
                " output=..."
            )

    def remove_if_not_begun(self) -> None:
        """Leave no folder of a run that was refused before it had made anything, unless another
        process is at it."""
        if self._is_not_begun():
            with locked(self.path / LOCK, wait=False) as mine:
                if mine and self._is_not_begun():
                    shutil.rmtree(self.path, ignore_errors=True)

    def _is_not_begun(self) -> bool:
        there = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        return CONFIG in there and there <= {CONFIG, RUN, LOCK}

    @classmethod
    def open(cls, path: Path, *, to_show: bool = False) -> RunDirectory:
        """The run in a folder. One that is only shown is opened even where a package that brought
        it something, such as its messenger, is not installed.

        Raises:
            RunError: there is none.
            ConfigurationError: its configuration is at fault, or names what is not known here.
        """
        try:
            values = tomllib.loads((path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            below = sorted(found.parent for found in path.glob(f"*/{CONFIG}"))
            instead = (
                f"; there are {len(below)} in it: name one, such as {below[0]}" if below else ""
            )
            why = error.strerror if isinstance(error, OSError) else error
            raise RunError(
                f"{path} holds no run: its {CONFIG} cannot be read ({why}){instead}"
            ) from error
        checked = recorded_config if to_show else make_config
        return cls(path, checked(values, str(path / CONFIG)))

    @property
    def identity(self) -> str:
        return str(self._json(RUN)["run"])

    @property
    def threads(self) -> int:
        """The number of threads that the run was begun with; on a CPU it decides the last bits of
        every sum."""
        return int(self._json(RUN)["threads"])

    @property
    def finished(self) -> bool:
        return (self.path / RESULT).exists()

    @property
    def package(self) -> Path:
        """Where the auxiliary model of a run lies: its own, or that of the configuration; of a
        study that has been moved, beside the run."""
        made = self.config.auxiliary.folder
        if not made:
            return self.auxiliary
        beside = self.path.resolve().parent / "packages" / Path(made).name
        return beside if beside.exists() and not Path(made).exists() else Path(made)

    def partition(self) -> dict[str, Any] | None:
        """The partition as it was written, or None before it was made."""
        return self._json(PARTITION) if (self.path / PARTITION).exists() else None

    def write_partition(self, partition: dict[str, Any]) -> None:
        write_json(self.path / PARTITION, partition)

    def state_store(self, party: str) -> StateStore:
        """A party's own state between rounds; in a deployment each client has a folder of its own
        instead. Any id makes a safe folder name."""
        from fedsp.federation.state_store import StateStore

        name = quote(party, safe="").replace(".", "%2E")
        if len(name) > LONGEST_NAME:
            name = f"{name[:100]}.{hashlib.sha256(party.encode()).hexdigest()}"
        return StateStore(self.path / "state" / name)

    def save_round(
        self, state: RunState, record: RoundRecord, best: Payload, spec: PromptSpec | None
    ) -> None:
        """Write down a finished round: the broadcast prompt, the `best` payload as the global model
        reads it, the journal, and last the checkpoint, which makes the round count. Without a
        `spec` the payload is no prompt.

        Raises:
            StorageError: the disk did not take it; the round before it stands.
        """
        name = f"round-{state.round:05d}.safetensors"
        if spec:
            _write_prompt(self.path / "prompts" / name, spec, state.payload)
        self._write_best(best, state.best_round, spec)
        self._append(ROUNDS, json.dumps(asdict(record), sort_keys=True))
        tensors = {
            f"{part}/{name}": tensor
            for part in ("payload", "best", "optimizer", "residual")
            for name, tensor in getattr(state, part).items()
        }
        summary = {
            "round": state.round,
            "best_round": state.best_round,
            "best_loss": state.best_loss,
            "best_losses": dict(state.best_losses),
        }
        write_tensors(self.path / "checkpoint" / name, tensors, {"state": json.dumps(summary)})
        for old in sorted((self.path / "checkpoint").glob("round-*.safetensors"))[:-2]:
            old.unlink()

    def state(self, info: Callable[[str], None]) -> RunState | None:
        """Where the run stands by its newest whole checkpoint, None before the first round; damaged
        ones are named through `say`.

        Journal lines of rounds that will be done again are dropped.
        """
        from fedsp.federation.loop import RunState
        from fedsp.models.trainable import entries_below

        found = None
        for path in sorted((self.path / "checkpoint").glob("round-*.safetensors"), reverse=True):
            try:
                tensors, metadata = read_tensors(path)
                summary = parse_json(metadata["state"])
                found = RunState(
                    round=int(summary["round"]),
                    payload=entries_below(tensors, "payload"),
                    best=entries_below(tensors, "best"),
                    best_round=int(summary["best_round"]),
                    best_loss=summary["best_loss"],
                    best_losses=summary.get("best_losses", {}),
                    optimizer=entries_below(tensors, "optimizer"),
                    residual=entries_below(tensors, "residual"),
                )
                break
            except (StorageError, KeyError, ValueError, TypeError) as error:
                info(
                    f"the checkpoint {path.name} is damaged and is not used; the one before it is,"
                    f" where there is one ({error})"
                )
                path.unlink()
        done = found.round if found else 0
        kept = [line for line in self.records() if line["round"] <= done]
        write_bytes(
            self.path / ROUNDS,
            "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept).encode(),
        )
        return found

    def records(self) -> list[dict[str, Any]]:
        """The journal, whole lines only.

        Raises:
            RunError: a line lacks what fedsp writes of a round.
        """
        found = self._lines(ROUNDS)  # a line cut short by a kill: its round is done again
        for record in found:
            missing = [name for name in RECORDED if name not in record]
            if missing:
                raise RunError(
                    f"{self.path / ROUNDS}: the line of round {record.get('round', '?')} is not"
                    f" what fedsp wrote: {missing[0]} is missing; restore the file"
                )
        return found

    def finish(
        self, best: Payload, round: int, figures: dict[str, Any], spec: PromptSpec | None
    ) -> None:
        """Write the best payload, as the global model reads it, and the figures; from now on the
        run is finished.

        Checkpoints of weights, which are as large as the model, are removed.
        """
        self._write_best(best, round, spec)
        write_json(self.path / RESULT, figures)
        for checkpoint in [] if spec else (self.path / "checkpoint").glob("round-*.safetensors"):
            checkpoint.unlink()

    def _write_best(self, best: Payload, round: int, spec: PromptSpec | None) -> None:
        metadata = {"round": str(round)}
        if spec:
            _write_prompt(self.best, spec, best, metadata)
        else:
            write_tensors(self.best, best, metadata)

    def write_scores(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write down what each test question got."""
        write_bytes(self.path / SCORES, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def scores(self) -> list[dict[str, Any]]:
        """What each test question got: id, log-likelihoods of the choices (nats), tokens, gold."""
        return self._lines(SCORES)

    def result(self) -> dict[str, Any]:
        """The figures of a finished run.

        Raises:
            RunError: it is not finished, or they are damaged.
        """
        if not self.finished:
            command = "serve" if self.config.federation else "run"
            raise RunError(
                f"{self.path} holds no finished run: finish it with `fedsp {command} --resume"
                f" {self.path}`"
            )
        return self._json(RESULT, "best_round", "disclosed_share")

    def about(self) -> dict[str, Any]:
        """Identity, seed, threads, versions and the commit that the run was made with."""
        return self._json(RUN)

    @property
    def pinned(self) -> bool:
        """Whether the digests of its inputs are written down, as they are from its start on."""
        return (self.path / INPUTS).exists()

    def pin(self, inputs: dict[str, str]) -> None:
        """Record the digests of the run's inputs, or compare them with those recorded at its start;
        one that the version of its start did not know is recorded now.

        Raises:
            RunError: an input is not what it was.
        """
        self.hold_known(inputs)
        known = self.inputs()
        if inputs.keys() - known.keys():
            write_json(self.path / INPUTS, {**inputs, **known})

    def inputs(self) -> dict[str, str]:
        """The digests of what the run was begun with, by name; none before it has pinned them."""
        return self._json(INPUTS) if self.pinned else {}

    def hold(self, inputs: dict[str, str]) -> None:
        """Hold some inputs, by their digests, against what the run was begun with.

        Raises:
            RunError: an input is not what it was.
        """
        known = self._json(INPUTS)
        changed = [name for name, digest in inputs.items() if known.get(name) != digest]
        if changed:
            raise RunError(
                f"{self.path} was started with another {' and another '.join(changed)}: restore the"
                " original, or start a new run"
            )

    def hold_known(self, inputs: dict[str, str]) -> None:
        """The same for inputs that the run may not have written down.

        Raises:
            RunError: one is not what it was.
        """
        if self.pinned:
            known = self._json(INPUTS)
            self.hold({name: digest for name, digest in inputs.items() if name in known})

    def seconds(self) -> dict[str, float]:
        """Seconds that all starts of the run took up to its last round, `all`, and that its
        `distillation` took."""
        none = {"all": 0.0, "distillation": 0.0}
        return none | (self._json(SECONDS) if (self.path / SECONDS).exists() else {})

    def write_seconds(self, seconds: Mapping[str, float]) -> None:
        """What `seconds` returns from now on."""
        write_json(self.path / SECONDS, dict(seconds))

    def log_traffic(self, round: int, client: str, direction: str, sizes: dict[str, int]) -> None:
        """Append a message to or from another process: bytes by name. What was sent before a kill
        was sent, so nothing is ever removed."""
        self._append(
            TRAFFIC,
            json.dumps({"round": round, "client": client, "direction": direction, "bytes": sizes}),
        )

    def traffic(self) -> list[dict[str, Any]]:
        """The messages to and from other processes, whole lines only."""
        return self._lines(TRAFFIC)

    def proxy_counts(self) -> list[dict[str, list[int]]]:
        """For each time that a deployment's proxy ran: requests, bytes up and bytes down by
        Flower's name of the call."""
        return self._lines(f"flower/{PROXY_COUNTS}")

    def _append(self, name: str, line: str) -> None:
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path / name}: {error.strerror}; free some space, then resume"
            ) from error

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        lines = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # cut short by a kill or a full disk
                entry = parse_json(line)
                if isinstance(entry, dict):
                    lines.append(entry)
        return lines

    def _json(self, name: str, *needed: str) -> dict[str, Any]:
        try:
            return read_json(self.path / name, *needed)
        except RunError as error:
            raise RunError(f"{self.path} holds no usable run: {error}") from error


def trained_rounds(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a journal that are rounds, and no question for validation losses alone."""
    return [record for record in records if record.get("trained", True)]


def validations(records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The finite validation losses of a journal, by the round whose payload each is of."""
    found = {}
    for record in records:
        judged = record.get("validated")
        if record["validation"] is not None and math.isfinite(record["validation"]):
            found[int(record["round"] if judged is None else judged)] = float(record["validation"])
    return found


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object in a file, with the keys that are needed of it.

    Raises:
        RunError: it cannot be read, or is something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror if isinstance(error, OSError) else error})"
        ) from error
    missing = (
        [name for name in needed if name not in value]
        if isinstance(value, dict)
        else ["a JSON object"]
    )
    if missing:
        raise RunError(f"{path} is not what fedsp wrote: {missing[0]} is missing")
    found: dict[str, Any] = value
    return found


def _write_prompt(
    path: Path, spec: PromptSpec, payload: Payload, metadata: dict[str, str] | None = None
) -> None:
    from fedsp.models.payload import PROMPT
    from fedsp.models.soft_prompt import SoftPrompt

    SoftPrompt(spec, payload[PROMPT]).save(path, metadata)


def differing_keys(one: RunConfig, other: RunConfig) -> list[str]:
    """The keys, but for `output`, in which two configurations differ."""
    first, second = (_with_whole_names(config) for config in (one, other))
    names = []
    for key in first:
        if isinstance(first[key], dict) and isinstance(second[key], dict):
            names += [
                f"{key}.{name}" for name in first[key] if first[key][name] != second[key][name]
            ]
        elif key != "output" and first[key] != second[key]:
            names.append(key)
    return names


def _with_whole_names(config: RunConfig) -> dict[str, Any]:
    """The values of a configuration; of a run that was begun before its files had their whole
    names, they are taken from the working folder."""
    values = config.model_dump()
    resolve_from_here(values)
    with contextlib.suppress(FileNotFoundError):  # the working folder is gone
        for name in ("train", "validation", "test"):
            if values["data"][name]:
                values["data"][name] = str(Path(values["data"][name]).absolute())
    return values


def find_runs(folder: Path) -> list[Path]:
    """The folders of the runs below a folder, sorted."""
    return [path.parent for path in sorted(folder.rglob(CONFIG)) if (path.parent / RUN).exists()]


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """One row for each run below a folder: folder, method, model, task, rounds, lowest validation
    loss, state."""
    rows = []
    for path in find_runs(folder):
        row: dict[str, Any] = {"folder": str(path)}
        row |= dict.fromkeys(("method", "model", "task", "rounds"), "-")
        row |= {"validation_loss": None, "state": "unreadable"}
        with contextlib.suppress(FedspError):
            directory = RunDirectory.open(path, to_show=True)
            config, lines = directory.config, directory._lines(ROUNDS)
            records = [line for line in lines if line.keys() >= set(RECORDED)]
            deployable = shown_method(config.method).deployable
            row |= {
                "method": f"{config.method}, {config.preset}" if deployable else config.method,
                "model": config.model.name,
                "task": config.data.task,
                "rounds": f"{len(trained_rounds(records))}/{config.round.rounds}",
                "validation_loss": min(validations(records).values(), default=None),
                "state": "finished" if directory.finished else "unfinished",
            }
        rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the bits of a run."""
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": source_commit(),
    }
    for name in (
        "fedsp",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "datasets",
        "flwr-datasets",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def source_commit() -> str:
    """The commit of the checkout that fedsp runs from, with a + where files differ from it;
    `released` where there is no checkout."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "released"
