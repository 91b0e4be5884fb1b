"""The client of a deployment: `fedsp join`. Only this process reads the text; separate Flower
processes transport the messages."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

from fedsp.config import PartyConfig
from fedsp.data.encoding import encode_targets
from fedsp.data.files import read_rows
from fedsp.data.rendering import Rendering
from fedsp.deployment.ipc import SOCKET, Socket
from fedsp.deployment.monitoring.connection import Lookout
from fedsp.deployment.monitoring.health import Health
from fedsp.deployment.package import hold_against_policy, open_package
from fedsp.deployment.parties.credentials import CA, CLIENT_KEY, SERVER_PUBLIC, client_signer
from fedsp.deployment.parties.release import wait_for_release
from fedsp.deployment.processes import Processes, free_port, host_and_port, options
from fedsp.deployment.restricted_executor import command, require_pinning
from fedsp.errors import (
    ConfigurationError,
    CredentialError,
    DeploymentError,
    PayloadError,
    PolicyError,
    StorageError,
    first_line,
)
from fedsp.federation.agreement import promised_epsilon
from fedsp.federation.callbacks import Callbacks
from fedsp.federation.chained_log import ChainedLog, record_event
from fedsp.federation.clients import client_messenger, client_shapes, make_method, make_party
from fedsp.federation.codecs import FLOAT32, parse_codec
from fedsp.federation.compression import difference, read_values
from fedsp.federation.egress import EGRESS
from fedsp.federation.messages import Request
from fedsp.federation.party import Party
from fedsp.federation.state_store import StateStore
from fedsp.federation.transport.message import Message
from fedsp.federation.transport.request_handler import answer, take_back
from fedsp.federation.transport.wire import (
    END,
    LONGEST_HEADER,
    most_bytes,
    sign_reply,
    write_refusal,
)
from fedsp.models.loading import choose_device, reduce_precision
from fedsp.models.messengers.registry import find_messenger
from fedsp.models.payload import Payload, check, pack
from fedsp.privacy import LEDGER, Ledger
from fedsp.storage import locked, write_json
from fedsp.training.dp_sgd import examples_together

GOODBYE = 4.0
"""Seconds in which Flower's node hands the last answer over."""

PAUSE = 3.0
"""Seconds from one start of Flower's node to the next."""

REFUSED, REFUSED_FOR = "Failed to activate SuperNode", 90.0
"""Log text of a node that the server refuses, and the seconds after which the refusal is final: for
60 s a server treats a vanished node as still connected and refuses its successor, too.
"""


class Client:
    """An owner of text: its rows, the package it was given, its policy, and what it remembers of
    what it has answered.

    Raises:
        FedspError: the data, the package or its signature cannot be used, or the policy refuses
            what the package asks.
    """

    def __init__(
        self, party: PartyConfig, callbacks: Callbacks, health: Health | None = None
    ) -> None:
        self.party = party
        self._info = callbacks.info
        self._health = health or Health(None, "health", "client")
        self._sign = client_signer(Path(party.keys) / CLIENT_KEY)
        rows = read_rows(Path(party.data.train), party.data.columns)
        device = choose_device(party.device)
        self.auxiliary, self.agreement = open_package(
            party.package, Path(party.keys) / SERVER_PUBLIC, device
        )
        if party.data.task not in (None, self.agreement.data.task):
            raise PolicyError(
                f"data.task: you expect {party.data.task!r}, but the signed package is for the task"
                f" {self.agreement.data.task!r}: ask the owner of the model which it is"
            )
        examples = Rendering.of(self.agreement.data).examples(rows)
        hold_against_policy(party.policy, self.agreement, self.auxiliary, len(examples))
        self.rows = encode_targets(self.auxiliary.tokenizer, examples, self.agreement.max_tokens)
        trains = find_messenger(self.agreement.messenger.kind).trains_weights
        if (self.agreement.client.auxiliary_steps or trains) and party.precision != "float32":
            raise PolicyError(
                "the run trains weights of the auxiliary model, which precision ="
                f" {party.precision!r} would freeze: set it to float32"
            )
        self._method = make_method(self.agreement, self.auxiliary)
        reduce_precision(self.auxiliary, party.precision, "precision")
        self._messenger = client_messenger(self.agreement, self.auxiliary)
        if self.agreement.privacy.unit == "example":
            examples_together(self.auxiliary, self._messenger(), self.agreement.max_tokens)
            self._info(
                "self-test: other examples of a batch change an example's gradient by at most"
                f" {self.auxiliary.largest_difference:.1e} of its norm"
            )
            if self.auxiliary.together == 1:
                self._info(
                    "in this precision rounding makes an example's gradient depend on its batch, so"
                    " each example is processed alone, which takes longer"
                )
        self._state = Path(party.state) / party.package.sha256[:16]
        self._shapes = client_shapes(self.agreement, self.auxiliary, self._messenger)
        lossy = self.agreement.compression.down != FLOAT32
        self._start = self._messenger().payload() if lossy else None
        self._last: tuple[Message, Message] | None = None
        self._received: dict[tuple[str, int], Payload] = {}
        self.answered, self.stopping = 0, Event()
        self.undone: dict[int, StorageError] = {}
        """By round, why its request was not done, where the disk did not take what it needed."""

    def respond(self, message: Message) -> Message:
        """The answer to a message; the same message again gets the same answer, without training
        again. What is no request gets an empty message. Every answer is in the journal of what has
        left before it is returned.

        Raises:
            StorageError: the journal cannot be written.
        """
        if self._last and self._last[0] == message:
            kind = json.loads(self._last[1].header.partition("\n")[2])["kind"]
            asked = json.loads(message.header)
            self._info(f"round {asked['round']}: asked again, sent the same {kind}")
            self._write_down(*self._last)
            return self._last[1]
        most = most_bytes(self._shapes)
        try:
            if len(message.header) > LONGEST_HEADER or len(message.payload) > most:
                raise PayloadError("the message is larger than what may travel")
            reply = answer(
                message,
                self._method,
                partial(self._open, message),
                allow=partial(self._allow, message),
                log=self._log,
                known=self._known,
            )
        except PayloadError as error:
            self._info(f"received {_amount(message)} that are not a valid request: {error}")
            return Message("")
        reply = sign_reply(self._released(message, reply), message, self._sign)
        self._write_down(message, reply)
        fields = json.loads(reply.header.partition("\n")[2])
        # a disk may have room again when it is asked again
        self._last = (message, reply) if fields.get("code") != "storage" else None
        self.answered += 1
        if fields["kind"] == "update":
            self.undone.pop(fields["round"], None)
        losses = [f"{name} loss {loss:.3f}" for name, loss in fields.get("losses", {}).items()]
        self._info(
            f"round {fields['round']}: received {_amount(message)}, sent {_amount(reply)}:"
            f" {fields['kind']} {', '.join(losses) or fields.get('code', '')}"
        )
        return reply

    @cached_property
    def _egress(self) -> ChainedLog:
        """Opened with the first answer, when no other process works in the folder."""
        return ChainedLog(Path(self.party.state) / EGRESS)

    def _released(self, message: Message, reply: Message) -> Message:
        """The reply; a refusal, where a person has to release updates and withholds this one."""
        fields = json.loads(reply.header)
        if self.party.policy.release != "ask" or fields["kind"] != "update":
            return reply
        figures = self._figures(message, reply) | {"losses": fields["losses"]}
        most = self.party.policy.release_seconds
        if wait_for_release(Path(self.party.state), figures, most, self.stopping, self._info):
            return reply
        asked = json.loads(message.header)
        named = {name: asked[name] for name in ("run", "round", "client", "seed")}
        take_back(self._open(message, named["client"]).store, named["round"])
        return write_refusal(Request(**named, payload={}), "withheld")

    def _figures(self, message: Message, reply: Message) -> dict[str, Any]:
        """What is to be known of an answer, signed or not, before it leaves."""
        asked = json.loads(message.header)
        fields = json.loads(reply.header.rpartition("\n")[2])
        broadcast, norm = self._received.get((asked["run"], asked["round"])), None
        if broadcast and reply.payload:
            values = read_values(reply.payload, broadcast, parse_codec(fields["codec"]))
            norm = math.sqrt(
                sum(float(one.square().sum()) for one in difference(values, broadcast).values())
            )
        delta = self.agreement.privacy.delta
        private = self.agreement.privacy.unit == "example"
        epsilon = Ledger(Path(self.party.state) / LEDGER).epsilon(delta) if private else None
        return {
            "run": asked["run"],
            "round": asked["round"],
            "kind": fields["kind"],
            "bytes": len(reply.payload),
            "codec": fields.get("codec"),
            "norm": norm,
            "epsilon": epsilon,
            "delta": delta if private else None,
        }

    def _write_down(self, message: Message, reply: Message) -> None:
        figures = self._figures(message, reply)
        sent = reply.header.encode() + reply.payload
        self._egress.write(
            **figures
            | {
                "bytes": len(sent),
                "sha256": hashlib.sha256(sent).hexdigest(),
                "payload": hashlib.sha256(reply.payload).hexdigest(),
                "package": self.party.package.sha256,
                "answers": hashlib.sha256(message.header.encode() + message.payload).hexdigest(),
            }
        )
        self._health.add("fedsp_answers", kind=figures["kind"])
        self._health.add("fedsp_bytes_sent", len(sent))
        self._health.set("fedsp_answer_seconds", time.time())
        if figures["epsilon"] is not None:
            self._health.set("fedsp_epsilon", figures["epsilon"])

    def _known(self, run: str, round: int) -> Payload | None:
        """The broadcast of a round, if it came here; of none, what the messenger begins with."""
        return self._received.get((run, round)) if round else self._start

    def _open(self, message: Message, client: str) -> Party:
        store = StateStore(self._state / str(json.loads(message.header)["run"]))
        # one for all packages and runs: the text is the same
        ledger = Ledger(Path(self.party.state) / LEDGER)
        most = self.party.policy.max_epsilon
        if most is None:
            most = promised_epsilon(self.agreement, len(self.rows))
        return make_party(
            client,
            self.agreement,
            self.auxiliary,
            self._messenger(),
            self.rows,
            store,
            ledger=ledger,
            max_epsilon=most,
        )

    def _allow(self, message: Message, request: Request) -> None:
        """Raises PolicyError or PayloadError for a request outside the package's agreement or the
        client's own policy.

        A round is answered once: again only to the very same request, as a server that was killed
        and resumed sends it.
        """
        if json.loads(message.header).get("package") != self.party.package.sha256:
            raise PolicyError(
                "the request is about another package than this client's: get the new one from the"
                " owner of the model"
            )
        if request.client != self.party.name:
            raise PolicyError("the request is for another client")
        if not re.fullmatch(r"[0-9a-f]{1,32}", request.run):
            raise PolicyError(
                "the request's run id is not 1 to 32 hexadecimal digits: the server's version of"
                " fedsp does not fit this client's"
            )
        rounds = self.agreement.rounds
        known = (
            request.round <= rounds
            if request.train
            else request.round == rounds + 1 and self.agreement.clients_validate
        )
        if not (known and request.round >= 1):
            raise PolicyError(
                f"round {request.round} is not one of the {rounds} that the package allows"
            )
        check(request.payload, self._shapes)
        if str(request.answer_in) != self.agreement.compression.up:
            raise PolicyError(
                f"the request asks for an answer in {request.answer_in}, the package allows"
                f" {self.agreement.compression.up}"
            )
        path = self._state / "rounds.json"
        answered: dict[str, str] = json.loads(path.read_bytes()) if path.exists() else {}
        # and not in which codec it came: after a kill it comes whole
        asked = [request.train, request.run, request.round, request.client, request.seed]
        this = f"{request.run} {request.round}"
        digest = hashlib.sha256(json.dumps(asked).encode() + pack(request.payload)).hexdigest()
        if answered.get(this, digest) != digest:
            raise PolicyError(f"round {request.round} was answered already, to another request")
        runs = {key.split()[0] for key in answered}
        if request.run not in runs and len(runs) >= self.agreement.runs:
            raise PolicyError(
                f"the package allows {self.agreement.runs} runs, and as many were answered: a new"
                " run needs a new package"
            )
        # the last validation has a count of its own
        alike = [key for key in answered if (int(key.split()[1]) <= rounds) == request.train]
        if this not in answered and len(alike) >= self.party.policy.max_rounds:
            raise PolicyError(
                f"{len(alike)} rounds were answered under this package, policy.max_rounds allows no"
                " more"
            )
        write_json(path, {**answered, this: digest})
        self._received = {(request.run, request.round): request.payload}

    def _log(self, request: Request, error: Exception) -> None:
        """Log an error on this machine: the message of a PolicyError, PayloadError or StorageError,
        else only the exception type, since its message may contain private text."""
        ours = isinstance(error, PolicyError | PayloadError | StorageError)
        if isinstance(error, StorageError):
            self.undone[request.round] = error
        if isinstance(error, PolicyError):
            state = Path(self.party.state)
            record_event(state, "request refused", round=request.round, why=first_line(error))
        what = first_line(error) if ours else type(error).__name__
        self._info(f"round {request.round}: not done: {what}")


def join(party: PartyConfig, callbacks: Callbacks) -> int:
    """Answer the server's requests until it says that the run is finished; returns the number of
    requests answered.

    With FEDSP_SOCKET set, no process of Flower's is started: a SuperNode of one's own runs with the
    same variable.

    Raises:
        FedspError: the client cannot take part, or Flower's process on this machine has ended.
        StorageError: the run is finished, but for lack of disk this client could not do all of it.
    """
    host_and_port(party.server, "server")
    for name in (CA, CLIENT_KEY, SERVER_PUBLIC):
        if not (Path(party.keys) / name).is_file():
            raise ConfigurationError(
                f"keys: there is no {Path(party.keys) / name}; "
                + (
                    "`fedsp party init` made it here, or it came with the folder of `fedsp"
                    " federation init`: bring it back, or make another with `fedsp party init`"
                    if name == CLIENT_KEY
                    else "it comes from the owner of the model"
                )
            )
    with Health(party.health, "health", "client") as health:
        try:
            return _join(party, callbacks, health)
        except CredentialError as error:
            why = first_line(error)
            with contextlib.suppress(StorageError):
                record_event(Path(party.state), "not connected", server=party.server, why=why)
            raise


def _join(party: PartyConfig, callbacks: Callbacks, health: Health) -> int:
    lookout = Lookout(party, callbacks, health, greets=SOCKET not in os.environ)
    lookout.look()
    client = Client(party, callbacks, health)
    if client.agreement.privacy.unit != "example":
        callbacks.info(
            "this run has no differential privacy: a dishonest owner of the model could craft a"
            " package whose answers leak words of your text; `fedsp inspect` finds only crude ones,"
            " policy.require_differential_privacy refuses such runs"
        )
    require_pinning()
    with ExitStack() as stack:
        if not stack.enter_context(locked(Path(party.state) / "lock", wait=False)):
            raise ConfigurationError(
                f"state: another `fedsp join` works in {party.state}: wait for it, or give this one"
                " a folder of its own"
            )
        about = {"server": party.server, "package": party.package.sha256}
        record_event(Path(party.state), "joined", **about, examples=len(client.rows))
        listening = Socket(os.environ.get(SOCKET))
        stack.callback(listening.close)
        place = Path(party.state) / "flower"
        processes = Processes(place, listening.path)
        stack.callback(processes.stop)
        node = Node(party, place, processes, callbacks)
        callbacks.info(
            f"{party.name} joins {party.server} with {len(client.rows)} examples; Flower's log is"
            f" {place / 'supernode.log'}"
        )

        def check() -> None:
            lookout.look()
            if SOCKET not in os.environ:
                node.keep_running()

        worker = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(client.stopping.set)  # an update that waits to be released waits no longer
        finished = False
        while not finished:
            channel = listening.accept(check)
            # whoever asked may have gone, or be nobody of ours
            with contextlib.suppress(DeploymentError, OSError, ValueError):
                _, (message,) = channel.receive()
                finished = message == END
                working = worker.submit(client.respond, message) if not finished else None
                while working and not working.done():
                    wait([working], timeout=0.5)
                    check()
                channel.send(None, [working.result() if working else END])
            channel.close()
        time.sleep(GOODBYE)
    if client.undone:
        raise StorageError(
            f"the run is finished, but what was asked in {len(client.undone)} of its rounds was not"
            f" done: {list(client.undone.values())[-1]}"
        )
    return client.answered


class Node:
    """Flower's SuperNode of this client and the pinned executor beside it, started again whenever
    they end: a node ends when the server that knew it is gone, when a connection breaks off at the
    wrong moment, and when it is refused."""

    def __init__(
        self, party: PartyConfig, place: Path, processes: Processes, callbacks: Callbacks
    ) -> None:
        self._party, self._place, self._processes = party, place, processes
        self._info = callbacks.info
        self._started, self._refused, self._short = -PAUSE, 0.0, 0

    def keep_running(self) -> None:
        """Start what is not running, after a pause.

        Raises:
            CredentialError: the server has refused this client's key for as long as it could take
                the client for one that is still connected.
        """
        ended = self._processes.ended("supernode") or self._processes.ended("executor")
        if self._started > 0 and not ended:
            return
        now = time.monotonic()
        if self._started > 0:
            if REFUSED not in self._processes.log_of("supernode"):
                self._refused = 0.0
            elif not self._refused:
                self._refused = now
            if self._refused and now - self._refused > REFUSED_FOR:
                raise CredentialError(
                    "the server refuses this client though it knows its key: another process is"
                    " connected by that key; end it, or ask the owner of the model"
                )
            if now - self._started < PAUSE:
                return
            self._short = self._short + 1 if now - self._started < REFUSED_FOR / 3 else 0
            if self._short == 5:
                self._info(
                    "Flower's node keeps ending: check that this machine's clock is right, and see"
                    " the node's log"
                )
            self._processes.stop()
        port, secret = free_port(), self._place / "executor.secret"
        secret.unlink(missing_ok=True)
        secret.touch(0o600)
        secret.write_bytes(secrets.token_bytes(32))
        self._processes.start("supernode", *supernode_command(self._party, port, secret))
        self._processes.start("executor", *executor_command(port, secret))
        self._started = now


def supernode_command(party: PartyConfig, port: int, secret: Path) -> list[str]:
    """Flower's own command for a client's SuperNode, which starts nothing by itself."""
    return [
        "flower-supernode",
        *options(
            superlink=party.server,
            root_certificates=Path(party.keys) / CA,
            auth_supernode_private_key=Path(party.keys) / CLIENT_KEY,
            host="127.0.0.1",
            port=port,
            isolation="process",
            superexec_auth_secret_file=secret,
        ),
    ]


def executor_command(port: int, secret: Path) -> list[str]:
    """The pinned executor beside a SuperNode."""
    address = f"127.0.0.1:{port}"
    return command(
        "superexec", runtime_api_address=address, insecure=True, superexec_auth_secret_file=secret
    )


def _amount(message: Message) -> str:
    return f"{sum(message.sizes().values()):,} bytes"
