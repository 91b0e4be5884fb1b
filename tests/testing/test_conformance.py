"""Extension points: what installed packages bring is found by name, and the kit says what is
missing."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from pydantic import BaseModel, Field
from torch import Tensor
from typer.testing import CliRunner

import fedsp
from fedsp import api
from fedsp.cli import app
from fedsp.config import Section
from fedsp.config_file import make_config
from fedsp.data import installed
from fedsp.data.encoding import Encoded
from fedsp.data.tasks import TASKS, find_task
from fedsp.deployment.package import read_agreement
from fedsp.errors import ConfigurationError, DataError
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import list_runs
from fedsp.federation.aggregation import registry as rules
from fedsp.federation.aggregation.registry import find_rule, register_rule
from fedsp.federation.aggregation.robust import RULES, Robust, trimmed_mean
from fedsp.federation.agreement import agreement_of
from fedsp.federation.methods import registry
from fedsp.federation.methods.base import Averaging
from fedsp.federation.methods.registry import MethodEntry, find_method
from fedsp.federation.party import Party
from fedsp.models.auxiliary import AuxiliaryModel
from fedsp.models.loading import load_model
from fedsp.models.messengers import registry as messengers
from fedsp.models.messengers.registry import Place, find_messenger
from fedsp.models.weights import Weights
from fedsp.testing import Nonconforming, check_messenger, check_method, check_rule, check_task
from fedsp.training.dp_sgd import PrivateSteps, fit_privately
from fedsp.training.loop import Optimisation
from support.small_runs import ROWS, settings

MODULE = """
import fedsp, torch

def said(row):
    return row["said"], ["yes", "no"], [0]
STATEMENT = fedsp.Task(name="statement", plain=said, schema="needs said")
METHOD = fedsp.MethodEntry(name="theirs", title="theirs", paper="", clients_hold="the whole model")
from fedsp.models.messengers.registry import find_messenger
import dataclasses
MESSENGER = dataclasses.replace(find_messenger("layers"), name="whole", learning_rate=2e-3)
def middle(rows, f):
    return rows.sort(dim=0).values[len(rows) // 2]
NUMBER = 3
"""


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Packages on the path, each with entry points by group."""
    registers = (TASKS, registry._ENTRIES, rules._REGISTERED, messengers._ENTRIES)
    before = [dict(known) for known in registers]
    monkeypatch.syspath_prepend(str(tmp_path))

    def bring(package: str, code: str, **points: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        about = tmp_path / f"{package}-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
        lines = [f"[fedsp.{group}]\n{point}\n" for group, point in points.items()]
        (about / "entry_points.txt").write_text("\n".join(lines))
        installed._installed.cache_clear()

    yield bring
    for known, old in zip(registers, before, strict=True):
        known.clear()  # type: ignore[attr-defined]
        known.update(old)  # type: ignore[attr-defined]
    installed._installed.cache_clear()


def test_what_an_installed_package_brings_is_found_by_its_name(
    brought: Callable[..., None], tmp_path: Path
) -> None:
    brought(
        "theirs_a",
        MODULE,
        tasks="statement = theirs_a:STATEMENT",
        methods="theirs = theirs_a:METHOD",
        aggregators="middle = theirs_a:middle",
        messengers="whole = theirs_a:MESSENGER",
    )
    assert "theirs_a" not in sys.modules
    with pytest.raises(DataError, match="did you mean 'statement'"):
        find_task("statment")
    with pytest.raises(ConfigurationError, match="did you mean 'middle'"):
        find_rule("midle")
    with pytest.raises(ConfigurationError, match="did you mean 'theirs'"):
        find_method("thiers")
    wrong = {**settings(tmp_path), "messenger": {"kind": "whle"}}
    with pytest.raises(ConfigurationError, match=r"kind: there is no .* did you mean 'whole'"):
        api.as_config(wrong)
    assert "theirs_a" not in sys.modules  # only what is asked for is imported
    assert find_task("statement").example({"said": "Is it?"}, 0).choices == (" yes", " no")
    assert (
        api.as_config({**settings(tmp_path, method="theirs"), "preset": "messenger"}).messenger.kind
        == "prompt"
    )
    assert find_method("theirs").title == "theirs"
    rows = torch.tensor([[1.0], [5.0], [2.0]])
    assert find_rule("middle")(rows, 1).tolist() == [2.0]
    changes: dict[str, Any] = {
        "aggregation": {"rule": "middle", "malicious": 0.34},
        "round": {"rounds": 1, "weighting": "uniform"},
        "messenger": {"kind": "whole"},
        "preset": "messenger",
    }
    values = settings(tmp_path, **changes)
    del values["prompt"]
    assert api.as_config(values).client.learning_rate == 2e-3
    assert api.plan(values)["messenger_parameters"] > 1e5
    assert fedsp.run(values)["best_round"] <= 1
    private = {"privacy": {"unit": "example", "epsilon": 8.0}}
    with pytest.raises(ConfigurationError, match="'whole' does not give; take 'prompt'"):
        api.as_config({**values, **private})


@pytest.mark.parametrize(
    ("code", "point", "sentence"),
    [
        (
            "import nowhere",
            "wrong:TASK",
            "data.task: .mine. cannot be imported from wrong:TASK .*nowhere",
        ),
        ("", "wrong:TASK", "cannot be imported"),
        (
            "import fedsp\nTASK = fedsp.Task(name='other', plain=None, schema='a')",
            "wrong:TASK",
            "has the name 'other'; give both one name",
        ),
        ("TASK = 3", "wrong:TASK", "wrong:TASK is a int, expected Task"),
        ("raise SystemExit(3)", "wrong:TASK", r"cannot be imported .*it ends Python: SystemExit.3"),
    ],
)
def test_what_cannot_be_used_is_named(
    brought: Callable[..., None],
    code: str,
    point: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    brought("wrong", code, tasks=f"mine = {point}")
    with pytest.raises(ConfigurationError, match=sentence):
        find_task("mine")


def test_a_messenger_of_this_process_alone_is_not_for_flower_s(
    brought: Callable[..., None], tmp_path: Path
) -> None:
    fedsp.register_messenger(replace(find_messenger("layers"), name="mine"))
    values = settings(tmp_path, messenger={"kind": "mine"})
    with pytest.raises(ConfigurationError, match="'mine' is registered in this process alone"):
        fedsp.run(values, engine="flower")
    assert not (tmp_path / "run").exists()
    fedsp.run({**values, "round": {"rounds": 1}})
    messengers._ENTRIES.pop("mine")
    with pytest.raises(ConfigurationError, match=r"'mine'; choose .* once an installed package"):
        fedsp.evaluate(tmp_path / "run")


def test_a_run_is_shown_without_the_packages_that_brought_it_something(
    tmp_path: Path,
) -> None:
    """Its messenger or its method; a report tells the first, and names the second as what it cannot
    read, since what clients hold is not known."""
    fedsp.register_messenger(replace(find_messenger("layers"), name="mine"))
    fedsp.register_method(replace(find_method("finetune"), name="own", title="my own"))
    small = {"round": {"rounds": 1}}
    fedsp.run(settings(tmp_path / "a", messenger={"kind": "mine"}, **small))
    fedsp.run(settings(tmp_path / "b", method="own", **small))
    messengers._ENTRIES.pop("mine")
    registry._ENTRIES.pop("own")
    rows = {Path(row["folder"]).parent.name: row for row in list_runs(tmp_path)}
    assert {row["state"] for row in rows.values()} == {"finished"}
    assert rows["b"]["method"] == "own" and rows["a"]["rounds"] == "1/1"
    for name, title in (("a", "FedSP"), ("b", "own")):
        shown = CliRunner().invoke(app, ["watch", str(tmp_path / name / "run")])
        assert shown.exit_code == 0 and title in shown.output
    fedsp.write_report([tmp_path], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "no method &#39;own&#39;" in page and "no messenger" not in page


class Needed(Section):
    width: int


class Keys(Section):
    width: int = Field(default=3, ge=1)
    part: Literal["first", "last"] = "last"


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("mine", {"widht": 3}, r"\[messenger.options\], has 1 fault:\n  widht: .* mean 'width'"),
        ("mine", {"width": 0}, "width: expected at least 1, not 0"),
        ("mine", {"part": "middle"}, "part: expected 'first' or 'last'"),
        ("mine", 7, "messenger.options: expected a table of keys, not 7"),
        ("adapter", {"width": 3}, "messenger.options: 'adapter' has no keys of its own"),
    ],
)
def test_a_messenger_names_its_own_keys(
    kind: str, options: Any, sentence: str, own: Callable[[], None], tmp_path: Path
) -> None:
    """They are checked at the server and, as the signed agreement has them, at each client; what is
    not set has the default of the server's package, not of the client's."""
    with pytest.raises(ConfigurationError, match=sentence):
        make_config(settings(tmp_path, messenger={"kind": kind, "options": options}), "run.toml")


def test_a_key_that_a_messenger_cannot_do_without_is_asked_for(tmp_path: Path) -> None:
    fedsp.register_messenger(replace(find_messenger("layers"), name="strict", options=Needed))
    with pytest.raises(ConfigurationError, match="width: missing; it has no default"):
        make_config(settings(tmp_path, messenger={"kind": "strict"}), "run.toml")
    messengers._ENTRIES.pop("strict")


def test_the_keys_of_a_messenger_are_a_section(tmp_path: Path) -> None:
    """A plain pydantic model would take unknown keys without a word."""
    entry = replace(find_messenger("layers"), name="loose", options=BaseModel)
    with pytest.raises(Nonconforming, match="BaseModel'>, which is no subclass of"):
        check_messenger(entry)


def test_the_agreement_has_every_key_of_a_messenger(
    own: Callable[[], None], tmp_path: Path
) -> None:
    given = {"kind": "mine", "options": {"part": "first"}}
    config = make_config(settings(tmp_path, messenger=given))
    assert config.messenger.options == {"width": 3, "part": "first"}
    agreement = agreement_of(config, 64)
    assert agreement.messenger.options == {"width": 3, "part": "first"}
    path = tmp_path / "agreement.json"
    path.write_text(agreement.model_dump_json())
    assert read_agreement(tmp_path) == agreement
    path.write_text(agreement.model_dump_json().replace('"width":3', '"width":-1'))
    with pytest.raises(ConfigurationError, match="width: expected at least 1, not -1"):
        read_agreement(tmp_path)


@pytest.fixture
def own() -> Iterator[None]:
    fedsp.register_messenger(replace(find_messenger("layers"), name="mine", options=Keys))
    yield
    messengers._ENTRIES.pop("mine")


@pytest.mark.parametrize(
    ("group", "name", "point", "find"),
    [
        ("tasks", "chat", "TASK", find_task),
        ("methods", "lora", "METHOD", find_method),
        ("messengers", "adapter", "MESSENGER", find_messenger),
        ("aggregators", "krum", "middle", find_rule),
    ],
)
def test_a_package_does_not_take_a_name_of_ours(
    group: str, name: str, point: str, find: Any, brought: Callable[..., None]
) -> None:
    """Nor is it passed over without a word."""
    code = MODULE.replace("statement", "chat").replace("theirs", "lora").replace("whole", "adapter")
    brought(
        f"taken_{group}",
        code.replace("STATEMENT", "TASK"),
        **{group: f"{name} = taken_{group}:{point}"},
    )
    with pytest.raises((ConfigurationError, DataError), match=f"{name}.*registered already"):
        find(name)


def test_two_packages_with_one_name_are_refused(brought: Callable[..., None]) -> None:
    for package in ("first_a", "second_a"):
        brought(package, MODULE, aggregators=f"middle = {package}:middle")
    with pytest.raises(ConfigurationError, match=r"several packages \(first_a, second_a\)|\(sec"):
        find_rule("middle")


def test_an_unknown_rule_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    values = settings(tmp_path, aggregation={"rule": "krumm"}, round={"weighting": "uniform"})
    for command in (fedsp.run, fedsp.plan):
        with pytest.raises(ConfigurationError, match="no rule 'krumm'; choose .*mean 'krum'"):
            command(values)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigurationError, match="there is no rule"):
        Robust(rule="krumm", malicious=0.2)
    with pytest.raises(ConfigurationError, match="a rule named 'trust' is registered already"):
        register_rule("trust", lambda rows, f: rows[0])


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (
            lambda rows, f: rows,
            r"'own' made no change of the updates: it gave \(5, 2\), not \(2,\)",
        ),
        (lambda rows, f: 3, "it gave a int, not a tensor"),
        (lambda rows, f: rows[0] / 0, "it gave numbers that are not finite"),
        (lambda rows, f: rows.nothing, "it raised AttributeError"),
    ],
)
def test_a_rule_that_makes_no_change_is_named(rule: Any, sentence: str) -> None:
    rules._REGISTERED["own"] = rule
    try:
        replies = {str(client): {"a": torch.ones(2) * client} for client in range(5)}
        robust = Robust(rule="own", malicious=0.2)
        with pytest.raises(ConfigurationError, match=sentence):
            robust({"a": torch.zeros(2)}, replies, dict.fromkeys(replies, 1.0), 5, None)
    finally:
        rules._REGISTERED.pop("own")


@pytest.mark.parametrize(("name", "rule"), [("", lambda rows, f: rows[0]), ("own", 3)])
def test_a_rule_has_a_name_and_is_a_function(name: str, rule: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a name and a function of it"):
        fedsp.register_rule(name, rule)
    assert name not in rules._REGISTERED


@pytest.mark.parametrize(
    ("check", "kind"),
    [(check_method, "MethodEntry"), (check_messenger, "MessengerEntry"), (check_task, "Task")],
)
def test_a_check_says_what_it_checks(check: Any, kind: str) -> None:
    nothing: Any = None
    rows: Any = {"prompt": "a", "completion": "b"}
    with pytest.raises(Nonconforming, match=f"expected a fedsp.{kind}, not None"):
        check_task(nothing, rows) if check is check_task else check(nothing)
    with pytest.raises(Nonconforming, match="give a list of one row at least, each a dictionary"):
        check_task(TASKS["completion"], rows)


def test_the_register_knows_our_own_rules() -> None:
    assert tuple(RULES) == rules.OURS


@pytest.mark.parametrize("name", sorted(RULES))
def test_our_own_rules_conform(name: str) -> None:
    check_rule(RULES[name])


def mean(rows: Tensor, f: int) -> Tensor:
    return rows.mean(dim=0)


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        (mean, "3 rows, f = 1 of them far above: they carry it off"),
        (
            lambda rows, f: rows.sort(dim=0).values[: len(rows) - f].mean(dim=0),
            "3 rows, f = 1 of them far below: they carry it off",
        ),
        (
            lambda rows, f: rows[rows.sum(dim=1).argsort()][: len(rows) - f].mean(dim=0),
            "f = 1 of them far in one number: they carry it off",
        ),
        (
            lambda rows, f: rows[
                (rows - rows.median(dim=0).values).norm(dim=1) < 1e5  # by size alone
            ].mean(dim=0),
            "f = 1 of them some fifty times as far as the others: they carry it off",
        ),
        (
            lambda rows, f: rows.median(dim=0).values if rows.shape[1] < 100 else rows[0, :3],
            r"5 rows of 1,000 numbers: \(3,\) is returned, expected a tensor \(1000,\)",
        ),
        (
            lambda rows, f: trimmed_mean(rows, f + 2),
            "3 rows, f = 1 of them far above: the change is .* or not finite",
        ),
        (lambda rows, f: rows[0], "the order of the rows matters"),
        (lambda rows, f: rows.median(), r"\(\) is returned, expected a tensor \(6,\)"),
        (lambda rows, f: rows.median(dim=0).values.float(), "torch.float32 or not finite"),
        (lambda rows, f: rows.median(dim=0).values / rows.shape[0], "does not move as the rows"),
        (lambda rows, f: rows.sub_(1.0).median(dim=0).values, "the rows are changed"),
        (lambda rows, f: rows[len(rows)], "IndexError.* is raised"),
        (lambda rows, f: rows.median(dim=0).values + 1, "not the row where all are the same"),
    ],
)
def test_what_a_rule_lacks_is_said(rule: Any, fault: str) -> None:
    with pytest.raises(Nonconforming, match=fault):
        check_rule(rule)


def test_our_own_tasks_conform() -> None:
    question = {key: ROWS[0][key] for key in ("question", "choices", "answer")}
    for name in ("multiple_choice", "continuation"):
        check_task(TASKS[name], [question])
    check_task(TASKS["completion"], [{"prompt": "a", "completion": "b"}])
    check_task(TASKS["chat"], [{"instruction": "a", "output": "b"}])


def task(render: Any, schema: str = "needs a") -> fedsp.Task:
    return fedsp.Task(name="mine", plain=render, schema=schema)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (
            task(lambda row: (row["a"], ["x"], [1])),
            "row 0 is refused: .*answer 1 but 1 choices",
        ),
        (task(lambda row: (row["a"] + " ", ["x"], [0])), "ends in white space"),
        (task(lambda row: ("", ["x"], [0])), "an empty context"),
        (task(lambda row: (row["a"], [" "], [0])), "row 0 is refused: DataError.*an empty one"),
        (task(lambda row: (row.pop("a"), ["x"], [0])), "row 0"),
        (task(lambda row: (str(row.get("a")), ["x"], [0])), "is taken for an example"),
        (task(lambda row: (row["b"], ["x"], [0])), "row 0 is refused"),
        (task(lambda row: (row["a"], ["x"], [0]), schema=""), "schema is empty"),
    ],
)
def test_what_a_task_lacks_is_said(made: fedsp.Task, fault: str) -> None:
    with pytest.raises(Nonconforming, match=fault):
        check_task(made, [{"a": "Who?"}])


@dataclass(frozen=True, kw_only=True)
class Restless(Averaging):
    """Keeps in the object what should be kept in a party's state."""

    seen: list[int]

    def client_update(self, client: Party, request: fedsp.Request) -> fedsp.Update:
        update = super().client_update(client, request)
        self.seen.append(request.round)
        payload = {name: one + 1e-3 * len(self.seen) for name, one in update.payload.items()}
        return replace(update, payload=payload)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "prompt"},
        {"kind": "adapter", "layers": "all", "targets": ["c_attn"]},
        {"kind": "layers"},
        {"kind": "prompt+adapter", "train_first": True},
    ],
    ids=lambda changes: changes["kind"],
)
def test_our_own_messengers_conform(changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedsp.testing.messengers.run_faults", lambda *_: []
    )  # whole runs: other tests
    check_messenger(find_messenger(changes["kind"]), messenger=changes)


class Offset(Weights):
    """A vector that is added to what each of some blocks gives, at every depth of its layer."""

    def __init__(self, place: fedsp.Place, start: float = 0.0, named: str = "layer") -> None:
        self.place, self.copies = place, dict[str, Tensor]()
        first = min(depths[0] for depths in place.blocks.values())
        made = {}
        for number, depths in place.blocks.items():
            name = f"layers.{number if named == 'layer' else depths[0]:03d}.offset"
            made[name] = torch.nn.Parameter(torch.full((place.model.shape.hidden,), start))
            for depth in depths:
                place.model.blocks[depth].register_forward_hook(partial(self.add, name, made[name]))
        super().__init__(made, first_depth=first)

    def add(self, name: str, own: Tensor, block: Any, inputs: Any, output: Any) -> Any:
        added = self.copies[name][:, None] if name in self.copies else own
        return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])

    @contextmanager
    def apart(self, count: int) -> Iterator[dict[str, Tensor]]:
        self.copies = {
            name: own.detach().repeat(count, 1).requires_grad_()
            for name, own in sorted(self.trained().items())
        }
        try:
            yield self.copies
        finally:
            self.copies = {}


def offsets(sizes: fedsp.Sizes) -> dict[str, list[int]]:
    return {f"{layer}.offset": [sizes.hidden] for layer in sizes.layers}


def changed(**others: Any) -> Callable[[fedsp.Place], Offset]:
    """Makes one with functions that do something else; each gets the messenger first."""

    def make(place: fedsp.Place) -> Offset:
        made = Offset(place)
        made.__dict__.update(
            {
                name: partial(other, made) if callable(other) else other
                for name, other in others.items()
            }
        )
        return made

    return make


def at_one_side(place: fedsp.Place) -> Weights:
    named = {"more": torch.nn.Parameter(torch.zeros(128))}
    return Offset(place) if isinstance(place.model, AuxiliaryModel) else Weights(named)


def grown(place: fedsp.Place) -> Weights:
    for depth, *_ in place.blocks.values():
        place.model.blocks[depth].register_parameter("offset", torch.nn.Parameter(torch.zeros(1)))
    return Offset(place)


def half_read(place: fedsp.Place) -> Weights:
    own = Offset(replace(place, blocks=dict(list(place.blocks.items())[:1])))
    return Weights(own.trained() | {n: torch.nn.Parameter(torch.zeros(128)) for n in rest(place)})


def rest(place: fedsp.Place) -> list[str]:
    return [f"layers.{number:03d}.offset" for number in list(place.blocks)[1:]]


def anew(place: fedsp.Place) -> Weights:
    found = Weights(
        {
            f"layers.{number:03d}.offset": place.model.blocks[depth].get_parameter("ln_1.bias")
            for number, (depth, *_) in place.blocks.items()
        }
    )
    own, number = found.payload, next(COUNT)
    found.payload = lambda: {n: one + number for n, one in own().items()}  # type: ignore[method-assign]
    return found


COUNT = itertools.count()


def keeps(made: Offset, payload: dict[str, Tensor]) -> None:
    for name, parameter in made.trained().items():
        parameter.data = payload[name]


@contextmanager
def unread(made: Offset, count: int) -> Iterator[dict[str, Tensor]]:
    yield {
        name: own.detach().repeat(count, 1).requires_grad_()
        for name, own in sorted(made.trained().items())
    }


@contextmanager
def stays(made: Offset, count: int) -> Iterator[dict[str, Tensor]]:
    with Offset.apart(made, count) as copies:
        yield copies
    made.copies = {name: copy.detach()[:1] + 1 for name, copy in copies.items()}


@contextmanager
def swapped(made: Offset, count: int) -> Iterator[dict[str, Tensor]]:
    with Offset.apart(made, count) as copies:
        one, *others, other = copies
        yield {one: copies[other], **{n: copies[n] for n in others}, other: copies[one]}


SPOILT: dict[str, tuple[Any, str]] = {
    "good": (Offset, ""),
    "other names": (at_one_side, "a client's tensors have other names"),
    "named by depth": (partial(Offset, named="depth"), "name them after the numbers of the global"),
    "begins as something": (partial(Offset, start=0.1), "otherwise once it is made: begin as if"),
    "grows the model": (grown, "it adds parameters or buffers to the model"),
    "half unread": (half_read, "reads a text as before where layers.007.offset is another"),
    "drawn anew": (anew, "a second one from the same seed begins with other numbers"),
    "takes more": (
        changed(load=lambda made, got: Weights.load(made, {n: got[n] for n in made.trained()})),
        "takes a payload with one tensor too many",
    ),
    "keeps what it gets": (changed(load=keeps), "or one of them keeps no copy"),
    "gives itself": (
        changed(payload=lambda made: {n: one.data for n, one in made.trained().items()}),
        "or one of them keeps no copy",
    ),
    "deaf": (changed(load=lambda made, payload: None), "payload.. is not what load.. took"),
    "far": (
        changed(distance=lambda made, payload: 100 * Weights.distance(made, payload)),
        "distance.. is 0 from its own payload and .* from another, expected 0 and",
    ),
    "no gradient": (
        changed(distance=lambda made, payload: Weights.distance(made, payload).detach()),
        "distance.. has no gradient",
    ),
    "late": (changed(first_depth=4), "first_depth is 4, and what block 0 gives depends on it"),
    "copies unread": (changed(apart=unread), "reading a batch within apart.. fails"),
    "copies stay": (changed(apart=stays), "otherwise once apart.. has ended"),
    "copies swapped": (changed(apart=swapped), "gradients of apart..'s copies are not those of"),
    "of no class": (
        lambda place: SimpleNamespace(trained=Offset(place).trained),
        "it has no payload, load, .*export, merge: make it a subclass of fedsp.Messenger",
    ),
    "not made": (lambda place: place.settings["nothing"], "code of 'spoilt' fails with KeyError"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_a_messenger_lacks_is_said(
    kind: str, brought: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsp.testing.messengers.run_faults", lambda *_: [])
    make, fault = SPOILT[kind]
    entry = fedsp.MessengerEntry(name="spoilt", make=make, shapes=offsets, per_example=True)
    if fault:
        with pytest.raises(Nonconforming, match=fault):
            check_messenger(entry)
        return
    check_messenger(replace(entry, distilled_layers=True))
    with pytest.raises(ConfigurationError, match=r"no messenger 'spoilt'; .* once an installed"):
        find_messenger("spoilt")  # a check leaves nothing behind
    fedsp.register_messenger(entry)
    with pytest.raises(Nonconforming, match="another messenger is registered under its name"):
        check_messenger(replace(entry))
    for changes, fault in (
        ({"shapes": lambda sizes: {}}, "'other' finds nothing to tune in this model"),
        ({"shapes": lambda sizes: {"a": [1]}}, "shapes.. counts other tensors"),
        ({"shapes": lambda sizes: sizes.layers["b"]}, "code of 'other' fails with KeyError"),
        ({"make": lambda place: Weights({})}, "'other' finds nothing to tune in .*/model: choose"),
        ({"learning_rate": -1.0}, "client.learning_rate: expected more than 0"),
    ):
        with pytest.raises(Nonconforming, match=fault):
            check_messenger(replace(entry, name="other", **changes))


def test_private_steps_go_to_the_tensors_that_they_are_of() -> None:
    """In whatever order a messenger names its parameters."""
    steps = PrivateSteps(noise_multiplier=0.0, bound=1e6, sampling_rate=1.0, count=1)
    moved = []
    for backwards in (False, True):
        model = load_model(str(EMBEDDED / "model"), device="cpu")
        place = Place(
            model=model,
            blocks={0: [0], 7: [7]},
            prompt=lambda: pytest.fail("it has no prompt"),
            settings={},
            seed=0,
        )
        made = Offset(place)
        if backwards:
            own = dict(reversed(made.trained().items()))
            made.__dict__["trained"] = lambda own=own: own
        fit_privately(
            model,
            made,
            [Encoded((3, 4, 5, 6, 7), 2)],
            steps,
            Optimisation(learning_rate=1.0, weight_decay=0.0),
        )
        moved.append(made.payload())
    assert all(torch.allclose(moved[0][name], moved[1][name], atol=1e-6) for name in moved[0])
    first, last = moved[0].values()
    assert not torch.allclose(first, last)


def test_methods_conform_or_are_told_why(brought: Callable[..., None]) -> None:
    check_method(find_method("fedprompt"))
    check_method(find_method("fedsp"), messenger={"kind": "adapter", "rank": 2})
    seen: list[int] = []

    def algorithm(stages: fedsp.Stages, start: Any) -> Restless:
        return Restless(client_stage=stages.messenger, server_stage=stages.server, seen=seen)

    entry = MethodEntry(
        name="restless", title="t", paper="", clients_hold="all", algorithm=algorithm
    )
    with pytest.raises(Nonconforming, match="two runs with one seed differ"):
        check_method(entry)

    def fails(stages: fedsp.Stages, start: Any) -> Restless:
        raise ValueError("no such stage")

    fedsp.register_method(entry)
    with pytest.raises(Nonconforming, match="another method is registered under its name"):
        check_method(replace(entry, algorithm=fails))
    with pytest.raises(Nonconforming, match=r"a run of two rounds fails: ValueError\('no such"):
        check_method(replace(entry, name="failing", algorithm=fails))


def test_a_method_that_forgets_on_its_way_is_told(brought: Callable[..., None]) -> None:
    """Each object counts from the beginning, so a resumed run counts anew."""

    def algorithm(stages: fedsp.Stages, start: Any) -> Restless:
        return Restless(client_stage=stages.messenger, server_stage=stages.server, seen=[])

    entry = MethodEntry(
        name="forgetful", title="t", paper="", clients_hold="all", algorithm=algorithm
    )
    with pytest.raises(Nonconforming, match="a resumed run has other bits"):
        check_method(entry)
