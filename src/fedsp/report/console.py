"""What a person sees: progress bars on a terminal, plain lines elsewhere, and tables. Used by the
command line only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fedsp.audit.findings import Finding
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.messages import RoundRecord
from fedsp.storage import each_figure

MOST_LABELS, MOST_CLIENTS = 12, 20
"""Labels that are shown, the most frequent ones; and clients."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Display:
    """A console with two bars, distillation and rounds; where output is not a terminal, a line for
    each round. `timed`: lines about the work begin with the time, as logs of a service do."""

    def __init__(self, *, timed: bool = False) -> None:
        self.timed = timed
        self.console = Console(width=None if os.isatty(1) else 160, soft_wrap=not os.isatty(1))
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}
        self.first: dict[str, int] = {}
        self.paces: list[float] = []

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def callbacks(self) -> Callbacks:
        return Callbacks(
            info=self.say,
            distilled=self._distilled,
            round_done=self._round_done,
            part_done=self._part_done,
        )

    def study_callbacks(self) -> Callbacks:
        """For many runs: bars on a terminal for the study and the run in it; elsewhere one line for
        each run."""
        callbacks = self.callbacks()
        if self.console.is_terminal:
            return callbacks
        return Callbacks(part_done=callbacks.part_done)

    def print(self, what: RenderableType) -> None:
        self.console.print(what, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """A line about the work."""
        self.print(
            f"{datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z} {text}" if self.timed else text
        )

    def finding(self, found: Finding) -> None:
        """A table, and below it what its words mean."""
        self.print(rows_table(found.title, found.rows))
        if found.note:
            self.print(Padding(Text(found.note, style="dim"), (0, 0, 1, 1)))

    def _distilled(self, step: int, steps: int, loss: float) -> None:
        left = self._advance("distillation", step, steps, f"loss {loss:.4f}")
        if not self.console.is_terminal and (step % max(1, steps // 5) == 0 or step == steps):
            self.say(f"distillation {step}/{steps}  loss {loss:.4f} (mean squared error)  {left}")

    def _round_done(self, record: RoundRecord, rounds: int) -> None:
        losses = "  ".join(
            f"{name} {loss:.3f}"
            for name, loss in {**record.client_losses, "server": record.server_loss}.items()
            if loss is not None
        )
        validation = ""
        if record.validation is not None:
            best = " (best)" if record.best_round == record.judged else ""
            of = f" of round {record.judged}" if record.judged != record.round else ""
            validation = f"  validation{of} {record.validation:.3f}{best}"
        failed = "".join(
            f"\n  {client} failed: {reason}" for client, reason in record.failed.items()
        )
        if record.shortened_examples:
            failed += (
                f"\n  {record.shortened_examples} of the clients' examples were too long and lost"
                " their oldest context"
            )
        if not record.trained:
            sent = f"{size(record.bytes_down)} down  {size(record.bytes_up)} up"
            self.say(f"clients' last judgement{validation}  {sent}{failed}")
            return
        left = self._advance("round", record.round, rounds, losses)
        self.say(
            f"round {record.round}/{rounds}  loss {losses or '-'}{validation} "
            f" {size(record.bytes_down)} down  {size(record.bytes_up)} up  {record.seconds:.1f} s "
            f" {left}{failed}"
        )

    def _part_done(self, part: int, parts: int, name: str, seconds: float) -> None:
        if seconds > 0.5:  # what was finished before, or elsewhere, says nothing of the pace
            self.paces.append(seconds)
        left = (
            f"{sum(self.paces) / len(self.paces) * (parts - part) / 60:.0f} min left at most"
            if self.paces and part < parts
            else ""
        )
        if self.console.is_terminal:
            self._advance("study", part, parts, "")
        self.print(f"{part}/{parts}  {name}  {seconds:.0f} s  {left}")

    def _advance(self, name: str, done: int, total: int, note: str) -> str:
        """Move a bar, and say how much time is left at the pace so far."""
        if done == 1 or name not in self.started:
            self.started[name], self.first[name] = time.perf_counter(), done
            if name in self.tasks:
                self.progress.remove_task(self.tasks[name])
            self.tasks[name] = self.progress.add_task(name, total=total, note=note, completed=done)
            return ""
        self.progress.update(self.tasks[name], completed=done, note=note)
        if done >= total:
            self.progress.remove_task(self.tasks.pop(name))
        seconds = (
            (time.perf_counter() - self.started[name])
            / max(1, done - self.first[name])
            * (total - done)
        )
        return f"{seconds:.0f} s left" if done < total else ""


def duration(seconds: float) -> str:
    """A time in the two largest units that it needs."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{hours} h {minutes % 60} min"


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def demo_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The demo's one table, with the federation's benefit below it."""
    notes = {
        "zero-shot": "nobody",
        "best office alone": "each of ten offices on its own text; the best of them",
        "prompt": "all offices; a soft prompt travels, as in FedSP",
        "adapter": "all offices; adapters in layers that both sides hold travel",
        "its auxiliary model": "the same adapters in the small model that every office has",
        "central": "one party with all text and the private model: no privacy",
    }
    value, low, high = next(row["benefit"] for row in rows if "benefit" in row)
    table = Table(
        title="Questions about people whom no office has seen, through the private model",
        title_justify="left",
        caption=(
            f"Federation benefit, adapter less best office alone: {100 * value:+.1f} points"
            f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        ),
        caption_justify="left",
    )
    for name in ("method", "accuracy", "answer perplexity", "traffic", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    table.add_column("who trains on what")
    for row in rows:
        perplexity = row["answer_perplexity"]
        table.add_row(
            row["method"],
            f"{row['accuracy']:.1%}",
            f"{perplexity:.2f}" if perplexity < 1e4 else f"{perplexity:.1e}",
            size(row["bytes"]) if row["bytes"] else "-",
            f"{row['seconds']:.0f}" if row["seconds"] else "-",
            notes[row["method"]],
        )
    return table


def rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line for each row; nested figures are left out."""
    if not rows:
        return f"{title}: none"
    table = Table(title=title, title_justify="left")
    pairs = (pair for row in rows for pair in row.items())
    columns = {name: value for name, value in pairs if not isinstance(value, dict | list)}
    for name, value in columns.items():
        table.add_column(
            name.replace("_", " "),
            justify="left" if isinstance(value, str) else "right",
            overflow="fold",  # on a narrow terminal nothing is cut off
        )
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in columns))
    return _Fitting(title, table, [{name: row.get(name) for name in columns} for row in rows])


@dataclass(frozen=True)
class _Fitting:
    """A table; where the console is too narrow for its longest words, a list for each row."""

    title: str
    table: Table
    rows: Sequence[Mapping[str, Any]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        words = Measurement.get(console, options.update(width=10_000), self.table).minimum
        if words <= options.max_width:
            yield self.table
            return
        yield Text(self.title, style="italic")
        for row in self.rows:
            one = Table(show_header=False)
            one.add_column()
            one.add_column(overflow="fold")
            for name, value in row.items():
                one.add_row(name.replace("_", " "), _text(value))
            yield one


def figures_table(title: str, figures: Mapping[str, Any]) -> Table:
    """One figure a line; nested figures get their own."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    for names, value in each_figure(figures):
        table.add_row(": ".join(names).replace("_", " "), _figure(names[-1], value))
    return table


PLAN = {
    "layers": "global layer at each depth of the auxiliary",
    "prompt_layers": "prompt layer that each depth reads",
    "global_parameters": "global model, parameters (shared and tied ones once)",
    "auxiliary_parameters": "auxiliary model, parameters (shared and tied ones once)",
    "ratio": "global / auxiliary",
    "package_bytes": "auxiliary package, float32, sent once to each client",
    "messenger_parameters": "messenger, parameters",
    "bytes_per_message": "one message as serialised, float32",
    "bytes_per_round": "traffic per round, down and up, all asked clients, by `compression`",
    "bytes_in_all": "traffic of the whole run",
    "client_operations_auxiliary": (
        "client, step on the auxiliary model, operations (batch of examples of {} tokens)"
    ),
    "client_operations_prompt": "client, step on the messenger, operations",
    "server_operations": "server step, operations",
    "client_memory_bytes": "client memory: weights, gradients, AdamW; activations on top",
    "server_memory_bytes": "server memory: the same",
    "disclosed_share": "share of the global parameters disclosed bit for bit, after distillation",
    "handed_out_share": "the same if handed out without distillation",
}
"""The rows of `fedsp plan`: figures, with their units and how they are counted."""


def sparkline(values: Sequence[float], width: int = 50) -> str:
    """Values as a line of blocks, the highest the tallest; of more than fit the last ones."""
    shown = list(values)[-width:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join(
        BLOCKS[round((len(BLOCKS) - 1) * (value - low) / (high - low))] if high > low else BLOCKS[0]
        for value in shown
    )


def progress_view(figures: Mapping[str, Any]) -> RenderableType:
    """The figures of `fedsp.report.progress.progress`. Of many clients those that failed come
    first."""
    table = Table(title=Text(figures["folder"]), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("method", figures["method"])
    state = "finished" if figures["finished"] else "not finished"
    if figures["seconds_since"] is not None and not figures["finished"]:
        state += f"; the last round ended {duration(figures['seconds_since'])} ago"
    table.add_row("state", state)
    left = figures["seconds_left"]
    table.add_row(
        "round",
        f"{figures['round']} of {figures['rounds']}"
        + (f", {duration(figures['seconds'])} each" if figures["seconds"] is not None else "")
        + (f", {duration(left)} left" if left else ""),
    )
    if losses := [loss for _, loss in figures["validation"]]:
        table.add_row("validation loss", sparkline(losses))
        table.add_row(
            "", f"{losses[0]:.4f} first, {losses[-1]:.4f} last, {figures['best']:.4f} best"
        )
    table.add_row("best round", str(figures["best_round"]))
    table.add_row("bytes down, up", f"{size(figures['bytes_down'])}, {size(figures['bytes_up'])}")
    if figures["epsilon"] is not None:
        table.add_row("epsilon so far", f"{figures['epsilon']:.3f}")
    clients = sorted(figures["clients"].items(), key=lambda one: one[1]["failed"] is None)
    for name, about in clients[:MOST_CLIENTS]:
        why = f"; failed: {about['failed']}" if about["failed"] else ""
        table.add_row(Text(name), Text(f"answered {about['answered']} of {about['asked']}{why}"))
    if len(clients) > MOST_CLIENTS:
        table.add_row(f"and {len(clients) - MOST_CLIENTS} more", "")
    return table


def watch(read: Callable[[], Mapping[str, Any]], seconds: float) -> None:
    """Show what `read` tells, again every so many seconds, until it is finished; once, where output
    is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.print(progress_view(read()))
        return
    with Live(progress_view(read()), console=console, auto_refresh=False) as live:
        while True:
            figures = read()
            live.update(progress_view(figures), refresh=True)
            if figures["finished"]:
                return
            time.sleep(seconds)


def egress_text(figures: Mapping[str, Any]) -> str:
    """What a client's journal says in sum, in the words of whoever answers for its text."""
    kinds = figures["messages"]
    if not kinds:
        return (
            "The journal is there but holds no whole line. A client makes it for its first message,"
            " so a kill or a full disk kept that from being written, and then it was not sent; or"
            " somebody has taken lines out."
        )
    runs = len(figures["runs"])
    norm, epsilon = figures["largest_norm"], figures["epsilon"]
    different = figures["updates"]
    again = (
        f" ({different} of them different, the others sent again)"
        if different < kinds.get("update", 0)
        else ""
    )
    lines = [
        f"From {figures['first']} to {figures['last']} this client sent {sum(kinds.values())}"
        f" messages ({size(figures['bytes'])}) in {runs} run{'s' if runs != 1 else ''}:"
        f" {kinds.get('update', 0)} updates{again} and {kinds.get('refusal', 0)} refusals.",
        "An update is the numbers of the messenger and six figures of its training; no message"
        " holds text, and what it is was in the signed package.",
    ]
    if norm is not None:
        lines.append(f"The largest update changed the messenger by {norm:.4g} (L2 norm).")
    if epsilon is not None:
        lines.append(
            f"Differential privacy: epsilon = {epsilon:.3f} at delta = {figures['delta']:g} for"
            " each example, over all that was sent with it so far."
        )
    if figures["unprotected"]:
        lines.append(
            f"{figures['unprotected']} update{'s' if figures['unprotected'] > 1 else ''} left"
            " without differential privacy: how much of the text they could reveal is not bounded."
            " `fedsp audit` measures it on a run of your own."
        )
    behind = figures.get("bytes_cut_short")
    state = (
        f"The last {behind} bytes of the journal are a line that was cut short. A kill or a full"
        " disk leaves such a line, and then its message was not sent; if somebody has cut it, it"
        " was sent, and is not counted above. The last whole line has"
        if behind
        else "The journal is whole; its last line has"
    )
    lines.append(
        f"{state} the digest {figures['chain'][:16]}: keep it with"
        " the date, so that lines cut off later show."
    )
    return "\n".join(lines)


def data_table(figures: Mapping[str, Any]) -> Table:
    """The figures of one file in `fedsp data check`. Of identifiers only the kind, the count and
    the place of the first are shown."""
    table = Table(title=Text(figures["file"]), title_justify="left", show_header=False)
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", ratio=3)
    table.add_row("read as", figures["read"])
    table.add_row("rows", f"{figures['rows']:,}")
    fields = (
        name if share == 1 else f"{name} ({share:.0%} of rows)"
        for name, share in figures["fields"].items()
    )
    table.add_row("fields", Text(", ".join(fields)))
    kinds = ", ".join(f"{name} ({count:,})" for name, count in figures["tasks"].items())
    table.add_row("examples by task", kinds or "none")
    if figures["unusable"]:
        table.add_row("cannot be used", Text(f"{figures['unusable']:,} rows: {figures['fault']}"))
    table.add_row("examples that are there twice", f"{figures['repeated']:,}")
    if "tokens" in figures:
        lengths = dict(figures["tokens"])
        cut = lengths.pop("cut", None)
        said = ", ".join(f"{name} {value:,g}" for name, value in lengths.items())
        lost = "" if cut is None else f"; {cut:,} examples lose their oldest context"
        table.add_row("tokens", said + lost)
    if labels := figures.get("labels"):
        most = list(labels.items())[:MOST_LABELS]
        more = f", and {len(labels) - len(most)} more" if len(labels) > len(most) else ""
        named = ", ".join(f"{name} ({count:,})" for name, count in most)
        table.add_row(f"{len(labels)} labels", Text(named + more))
    found = [
        f"{kind}: {about['rows']:,} rows, the first in {about['first']}"
        for kind, about in figures["identifiers"].items()
    ]
    table.add_row("what looks like a person's", Text("\n".join(found) or "nothing was found"))
    for number, example in enumerate(figures["preview"], start=1):
        shown = f"{example['context']}[{example['answer']}]"
        table.add_row(
            f"example {number}", Text(shown if len(shown) < 600 else f"{shown[:600]} ...")
        )
    return table


def plan_table(figures: Mapping[str, Any]) -> Table:
    """The figures of `fedsp plan`."""
    table = Table(title=f"Plan for {figures['model']}", title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, label in PLAN.items():
        value = figures[name]
        if name.endswith("layers"):
            value = " ".join(map(str, value))
        elif name.endswith("parameters"):
            value = f"{value:,}"
        elif name == "ratio":
            value = f"{value:.2f}"
        table.add_row(label.format(figures["tokens_per_example"]), _figure(name, value))
    return table


def _figure(name: str, value: Any) -> str:
    """A figure as its name asks for it."""
    if "bytes" in name:
        return size(value)
    if name.endswith("share"):
        return f"{value:.1%}"
    if "operations" in name:
        return f"{value:.2e}" if value else "none"
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if value.is_integer() and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.2e}"
