"""The thread that answers: texts that arrive while others are written join them (continuous
batching), first come, first served; texts for other tuned messengers wait until the models are
free."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Literal

import torch
from torch import Tensor

from fedsp.models.running_texts import runs_together
from fedsp.training.answers import Answers, AnswersAlone, RunningAnswers

AT_ONCE = 16
"""Texts that are written together."""

MOST_WAITING = 128
"""Texts that may wait; further ones are refused."""

End = Literal["stop", "length", "failed"]
"""Why a text ended: the model ended it, it has as many tokens as were asked for, or the models
could not be run."""


@dataclass(kw_only=True)
class Wanted:
    """A text that is to be continued.

    model: who answers, by name. ids: its tokens. most: tokens at most. ends: tokens before which it
    ends. choose: takes each token from its scores (V,). told: hears each new token, and at last why
    it ended, in the engine's thread.
    left: set by whoever no longer wants it.
    """

    model: str
    ids: tuple[int, ...]
    most: int
    ends: Collection[int]
    choose: Callable[[Tensor], int]
    told: Callable[[int | End], None]
    left: bool = False
    written: int = field(default=0, init=False)

    def hears(self, scores: Tensor) -> int | None:
        """Choose the next token and tell it; None, and why, if it was the last, or if it ends the
        text itself."""
        try:
            token = self.choose(scores)
        except Exception:  # it is this text's own fault, and not that of the others
            logging.getLogger("fedsp").exception("a token could not be chosen")
            self.told("failed")
            return None
        if token in self.ends:
            self.told("stop")
            return None
        self.told(token)
        self.written += 1
        if self.written == self.most:
            self.told("length")
            return None
        return token


class Full(Exception):
    """Too many texts wait."""


class Engine:
    """Answers texts in a thread of its own, from `start` to `stop`.

    answers: who answers, by name. Each loads its numbers into models that others may share, so one
    at a time runs.
    """

    def __init__(self, answers: Mapping[str, Answers]) -> None:
        self._answers = answers
        models = {id(side.model): side.model for one in answers.values() for side in one.sides}
        together = {key: runs_together(model) for key, model in models.items()}
        self.at_once = {
            name: AT_ONCE if all(together[id(side.model)] for side in one.sides) else 1
            for name, one in answers.items()
        }
        """How many texts each answers together: one, where a model does not read several as each
        alone."""
        self._waiting: deque[Wanted] = deque()
        self._something = Condition()
        self._stopping = False
        self._thread = Thread(target=self._run, name="fedsp-engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End, once the token that is being computed is told; who still waits is told that it
        failed."""
        with self._something:
            self._stopping = True
            self._something.notify()
        if self._thread.is_alive():
            self._thread.join()

    def ask(self, *wanted: Wanted) -> None:
        """Let texts wait for their turn, all or none.

        Raises:
            Full: too many wait already.
        """
        with self._something:
            self._waiting = deque(one for one in self._waiting if not one.left)
            if len(self._waiting) + len(wanted) > MOST_WAITING:
                raise Full
            self._waiting += wanted
            self._something.notify()

    def _run(self) -> None:
        while True:
            with self._something:
                self._something.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    for one in self._waiting:
                        one.told("failed")
                    return
                name = self._waiting[0].model
            going: list[Wanted] = []
            try:
                self._answer(name, going)
            except Exception:  # a text must not end the server for all others
                logging.getLogger("fedsp").exception("texts could not be answered")
                for one in going or self._all_of(name):
                    one.told("failed")

    def _all_of(self, name: str) -> list[Wanted]:
        """Those that wait for a name that cannot answer at all, who wait no longer."""
        with self._something:
            found = [one for one in self._waiting if one.model == name]
            self._waiting = deque(one for one in self._waiting if one.model != name)
        return found

    def _answer(self, name: str, going: list[Wanted]) -> None:
        """Write texts with one name's answers until none is going on."""
        answers, most = self._answers[name], self.at_once[name]
        device = answers.sides[0].model.device
        running = RunningAnswers(answers) if most > 1 else AnswersAlone(answers)
        last: list[int] = []
        while True:
            while len(going) < most and (new := self._next(name)):
                going.append(new)
                token = new.hears(running.join(torch.tensor(new.ids, device=device)))
                last.append(-1 if token is None else token)
                self._leave(running, going, last)
            if not going or self._stopping:
                for one in going:
                    one.told("failed")
                return
            scores = running.step(torch.tensor(last, device=device))
            for row, one in enumerate(going):
                token = one.hears(scores[row])
                last[row] = -1 if token is None else token
            self._leave(running, going, last)

    def _leave(
        self, running: RunningAnswers | AnswersAlone, going: list[Wanted], last: list[int]
    ) -> None:
        """Let texts go that have ended, or that nobody wants any more."""
        rows = [row for row, one in enumerate(going) if last[row] >= 0 and not one.left]
        if len(rows) < len(going):
            running.keep(rows)
            going[:], last[:] = [going[row] for row in rows], [last[row] for row in rows]

    def _next(self, name: str) -> Wanted | None:
        """The text whose turn it is, if it is for this name."""
        with self._something:
            while self._waiting and self._waiting[0].left:
                self._waiting.popleft()
            if self._waiting and self._waiting[0].model == name and not self._stopping:
                return self._waiting.popleft()
            return None
