"""Real processes: a server and clients over TLS on this machine, and Flower's simulation. Marked
`deployment`: minutes rather than seconds."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tomli_w
import torch

from fedsp import api as commands
from fedsp.audit.traffic import traffic
from fedsp.config_file import make_config
from fedsp.deployment.parties.credentials import CA, make_client_credentials
from fedsp.deployment.parties.new_federation import init_federation
from fedsp.deployment.parties.release import waiting
from fedsp.deployment.processes import free_port
from fedsp.deployment.serve import APP
from fedsp.experiments.embedded import EMBEDDED
from fedsp.experiments.run_directory import RunDirectory
from fedsp.federation.chained_log import read_log
from fedsp.federation.egress import read_egress
from fedsp.federation.transport.wire import REFUSALS
from fedsp.models.auxiliary import load_auxiliary
from fedsp.models.loading import load_model
from fedsp.models.trainable import trainable
from support.deployed import Deployment, exited, until
from support.small_federation import make_federation
from support.small_runs import prompt_bits, settings

pytestmark = pytest.mark.deployment
CLIENTS = ("client-0", "client-1", "client-2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Path, int]:
    torch.set_num_threads(1)
    port = free_port()
    local, place = make_federation(tmp_path_factory.mktemp("deployment"), port)
    return local, place, port


@contextmanager
def copied(made: tuple[RunDirectory, Path, int], folder: Path) -> Iterator[Deployment]:
    place = Path(shutil.copytree(made[1], folder / "federation"))
    path = place / "server" / "run.toml"
    path.write_text(path.read_text().replace(str(made[1]), str(place)))
    deployment = Deployment(place, made[2])
    try:
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture()
def deployment(made: tuple[RunDirectory, Path, int], tmp_path: Path) -> Iterator[Deployment]:
    with copied(made, tmp_path) as one:
        yield one


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Path, int]:
    """The same with adapters that travel as changes, both ways, and over IPv6 where the machine has
    it."""
    port = free_port()
    host, listen = "[::1]", "[::]"
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        host, listen = "localhost", "127.0.0.1"
    changes = {"up": "int8", "down": "int8"}
    folder = tmp_path_factory.mktemp("coded")
    adapter = {"kind": "adapter", "rank": 16}
    local, place = make_federation(
        folder, port, host=host, listen=listen, compression=changes, messenger=adapter
    )
    return local, place, port


@pytest.fixture()
def coded_deployment(coded: tuple[RunDirectory, Path, int], tmp_path: Path) -> Iterator[Deployment]:
    with copied(coded, tmp_path) as one:
        yield one


def shingles(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[bytes, str]:
    """Every 64 bytes of every tensor, at steps of 64, by the tensor's name: any 127 bytes of it
    that stand somewhere hold one of them."""
    found = {}
    for name, tensor in tensors.items():
        data = tensor.detach().to(dtype).contiguous().numpy().tobytes()
        pieces = (data[start : start + 64] for start in range(0, len(data) - 63, 64))
        found.update({piece: name for piece in pieces if len(set(piece)) > 8})
    return found


def seen_in(data: bytes, pieces: dict[bytes, str]) -> set[str]:
    return {
        pieces[data[start : start + 64]]
        for start in range(len(data) - 63)
        if data[start : start + 64] in pieces
    }


def test_clients_that_die_are_done_without_and_too_few_stop_the_run_with_code_2(
    deployment: Deployment,
) -> None:
    """Two of three are killed in round 3: with two needed the run stops. One of them comes back,
    and the resumed run ends without the other."""
    limits = ("federation.connect_seconds=20", "round.min_clients=2")
    server = deployment.serve("run.toml", *limits)
    clients = {client: deployment.join(client) for client in CLIENTS}
    until(lambda: (deployment.run / "checkpoint" / "round-00002.safetensors").exists(), 300)
    for client in ("client-1", "client-2"):
        clients[client].kill()
    assert exited(server) == 2
    said = deployment.said("server")
    assert "round.min_clients is 2 (client-1:" in said and "can be resumed" in said
    deployment.join("client-1")
    assert exited(deployment.serve("--resume", str(deployment.run))) == 0
    records = RunDirectory.open(deployment.run).records()
    assert [len(record["answered"]) for record in records] == [3, 3, 2]
    assert sorted(records[-1]["failed"]) == ["client-2"]


def test_a_server_that_is_killed_ends_with_the_bits_of_an_undisturbed_run(
    coded_deployment: Deployment, coded: Any
) -> None:
    """kill -9 between two replies and before a checkpoint, resumed after each; the clients stay,
    lose the server twice, and find it again. A resumed server does not know what its clients hold,
    and sends whole prompts. Nothing that a killed server started outlives it. Every boundary is
    tried in `test_remote`."""
    deployment, made = coded_deployment, coded
    clients = [deployment.join(client) for client in CLIENTS]
    start: tuple[str, ...] = ("run.toml",)
    for boundary, round in (("after-one-reply", 1), ("before-checkpoint", 2)):
        killed = deployment.serve(*start, kill=f"{boundary}:{round}")
        if round == 1:
            until(lambda: "listening on" in deployment.said("server"))
            children = psutil.Process(killed.pid).children(recursive=True)
        assert exited(killed) == -signal.SIGKILL, f"{boundary}: {deployment.said('server')}"
        if round == 1:
            assert len(children) >= 4 and not psutil.wait_procs(children, 30)[1]
        start = ("--resume", str(deployment.run))
    assert exited(deployment.serve(*start)) == 0, deployment.said("server")
    assert [exited(client, 90) for client in clients] == [0, 0, 0], deployment.said("client-0")
    assert prompt_bits(deployment.run) == prompt_bits(made[0].path)
    assert [record["round"] for record in RunDirectory.open(deployment.run).records()] == [1, 2, 3]
    assert "nothing listens at" in deployment.said(
        "client-0"
    ) and "answers again" in deployment.said("client-0")


def test_three_clients_over_tls_give_the_bits_of_a_run_in_one_place_and_send_nothing_else(
    deployment: Deployment, made: Any, tmp_path: Path
) -> None:
    record = tmp_path / "sent"
    bundle = shutil.copytree(APP, tmp_path / "bundle")
    code = (bundle / "messenger.py").read_text()
    marker = (
        f"import sys\nimport pathlib\npathlib.Path({str(tmp_path)!r}, 'ran-in-' +"
        " pathlib.Path(sys.argv[0]).name).touch()\n"
    )
    (bundle / "messenger.py").write_text(code.replace("import os\n", "import os\n" + marker, 1))
    for name in (
        "httpx.py",
        "flwr.py",
        "fedsp.py",
    ):  # nor what lies in the folder that the server's owner handed over
        (deployment.place / "client-0" / name).write_text(
            f"import pathlib; pathlib.Path({str(tmp_path)!r}, 'ran-{name}').touch(); raise"
            " SystemExit(9)"
        )
    server = deployment.serve(
        "run.toml", "federation.retry_seconds=300", record=str(record), hostile=str(bundle)
    )
    clients = [deployment.join(client) for client in CLIENTS]
    assert exited(server) == 0, deployment.said("server")
    assert [exited(client, 60) for client in clients] == [0, 0, 0]
    assert prompt_bits(deployment.run) == prompt_bits(made[0].path)

    assert {path.name for path in tmp_path.glob("ran-*")} == {"ran-in-flwr-serverapp"}, (
        "the server's bundle runs at the server alone"
    )

    rows = [row for row in traffic(deployment.run) if row["client"] in CLIENTS]
    calls = {
        (row["name"], row["direction"]): row["bytes"]
        for row in traffic(deployment.run)
        if row["client"] not in CLIENTS
    }
    assert (
        calls["Flower's push-object", "up"] > 9 * 16_000
        and calls["Flower's pull-object", "down"] > 9 * 16_000
    )
    assert {(row["name"], row["direction"], row["messages"]) for row in rows} == {
        (name, way, 3) for name in ("header", "prompt.values") for way in ("up", "down")
    }
    assert sum(row["bytes"] for row in rows if row["name"] == "header") < 3 * 6 * 500
    everything = "".join(
        path.read_text(errors="replace")
        for path in [*deployment.place.glob("*/*.log"), *deployment.place.glob("**/flower/*.log")]
    )
    assert "round 3" in everything and not any(
        row in everything for row in ("The town of", "The trade of", "The dish of")
    )

    sent, model = (
        record.read_bytes(),
        load_model(str(EMBEDDED / "model"), device="cpu", positions="hugging_face"),
    )
    weights = trainable(model.model)
    both = shingles(weights, torch.float32) | shingles(weights, torch.float16)
    assert len(sent) > 3 * 3 * 16_000 and len(both) > 50_000
    assert seen_in(sent, both) == set(), "a weight of the global model was sent"
    planted = (
        sent[:1000]
        + weights["transformer.h.3.mlp.c_fc.weight"].numpy().tobytes()[1001:1201]
        + sent[1000:2000]
    )
    assert seen_in(planted, both) == {"transformer.h.3.mlp.c_fc.weight"}, (
        "the scan would have seen it"
    )


def test_a_client_killed_and_started_again_keeps_its_place(
    coded_deployment: Deployment, coded: Any
) -> None:
    """kill -9 of a client as soon as the server has its answer to round 1; started again, it is
    asked for the rest, and the bits are the same. It has lost the broadcast that the next one is a
    change of, says so, and gets the whole; nobody else does."""
    deployment, made = coded_deployment, coded
    server = deployment.serve()
    clients = {client: deployment.join(client) for client in CLIENTS}

    def values(direction: str) -> list[tuple[str, int]]:
        """Whose each message was, and the bytes of its values."""
        journal = deployment.run / "traffic.jsonl"
        rows = RunDirectory.open(deployment.run).traffic() if journal.exists() else []
        return [
            (row["client"], row["bytes"].get("prompt.values", 0))
            for row in rows
            if row["direction"] == direction
        ]

    until(lambda: "client-2" in dict(values("up")))
    clients["client-2"].kill()
    exited(clients["client-2"])
    clients["client-2"] = deployment.join("client-2")
    assert exited(server) == 0, deployment.said("server")
    assert prompt_bits(deployment.run) == prompt_bits(made[0].path)
    records = RunDirectory.open(deployment.run).records()
    assert [len(record["answered"]) for record in records] == [3, 3, 3]
    assert records[0]["bytes_down"] < records[0]["bytes_up"] / 10, "adapters begin alike"
    change = max(sent for client, sent in values("down") if client == "client-0")
    whole = [client for client, sent in values("down") if sent > 3 * change]
    assert set(whole) == {"client-2"} and max(sent for _, sent in values("up")) < change


def test_a_hospital_s_client_is_watched_sends_what_a_person_released_and_can_prove_it(
    deployment: Deployment,
) -> None:
    """`policy.release = "ask"` and `health` of a real server and a real client: the update of round
    2 is withheld, and what the client's journal, the server's record and both monitors say agrees.
    """
    ours = deployment.place / "client-0"
    ports = {"server": free_port(), "client": free_port()}
    party = tomllib.loads((ours / "party.toml").read_text())
    party |= {"health": f"127.0.0.1:{ports['client']}", "policy": {"release": "ask"}}
    (ours / "party.toml").write_text(tomli_w.dumps(party))

    def figure(role: str, name: str) -> str:
        told = httpx.get(f"http://127.0.0.1:{ports[role]}/metrics").text
        return next(line.split()[-1] for line in told.splitlines() if line.startswith(name))

    def command(*words: str, answer: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fedsp", *words],
            cwd=ours,
            input=answer,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    server = deployment.serve(
        "run.toml",
        f"federation.health=127.0.0.1:{ports['server']}",
        "federation.retry_seconds=300",
        "round.min_clients=2",
    )
    clients = [deployment.join(client) for client in CLIENTS]
    for round, answer in enumerate(("y", "", "y"), 1):
        until(lambda: bool(waiting(ours / "state")))
        for role in ports:
            health = httpx.get(f"http://127.0.0.1:{ports[role]}/healthz")
            assert health.status_code == 200 and health.json() == {"status": "ok", "role": role}
        assert float(figure("client", "fedsp_server_reached")) == 1
        if round > 1:
            assert float(figure("server", "fedsp_round ")) == round - 1
            assert float(figure("server", "fedsp_rounds ")) == 3
            assert float(figure("client", 'fedsp_answers{kind="update"}')) == 1
            sent = float(figure("client", "fedsp_bytes_sent"))
            assert sent == sum(
                entry["bytes"] for entry in read_egress(ours / "state" / "egress.jsonl")
            )
        told = command("egress", "release", answer=f"{answer}\n")
        assert f"round {round}: 16,472 bytes" in told
    assert exited(server) == 0, deployment.said("server")
    assert [exited(client, 60) for client in clients] == [0, 0, 0], deployment.said("client-0")

    records = RunDirectory.open(deployment.run).records()
    assert [len(record["answered"]) for record in records] == [3, 2, 3]
    assert records[1]["failed"] == {"client-0": REFUSALS["withheld"]}
    journal = read_egress(ours / "state" / "egress.jsonl")
    assert [(entry["kind"], entry["round"]) for entry in journal] == [
        ("update", 1),
        ("refusal", 2),
        ("update", 3),
    ]
    received = sum(
        row["bytes"]
        for row in traffic(deployment.run)
        if (row["client"], row["direction"]) == ("client-0", "up")
    )
    assert received == sum(entry["bytes"] for entry in journal)
    told = command("egress", "report", "party.toml")
    assert (
        "2 updates and 1 refusals" in told and "2 updates left without differential privacy" in told
    ), told
    events = [entry["event"] for entry in read_log(ours / "state" / "security.jsonl", "")]
    assert events == ["joined", "released", "withheld", "released"]
    at_server = read_log(deployment.place / "server" / "security.jsonl", "")
    assert {entry["event"] for entry in at_server} >= {"serving", "finished"}


def test_the_package_holds_of_the_global_model_what_its_plan_declares(made: Any) -> None:
    model = load_model(str(EMBEDDED / "model"), device="cpu", positions="hugging_face")
    package = made[1] / "server" / "package"
    auxiliary = load_auxiliary(package, device=torch.device("cpu"), positions="hugging_face")
    data = b"".join(path.read_bytes() for path in sorted(package.iterdir()))
    blocks = {
        int(name.split(".h.")[1].split(".")[0])
        for name in seen_in(data, shingles(trainable(model.model), torch.float32))
        if ".h." in name
    }
    assert (
        blocks
        == {
            source
            for source, frozen in zip(auxiliary.plan.sources, auxiliary.plan.frozen, strict=True)
            if frozen
        }
        == {0, 1, 6, 7}
    )


def test_a_flower_simulation_gives_the_bits_of_a_run_in_one_place(
    made: Any, tmp_path: Path
) -> None:
    code = "import sys; from fedsp.cli import main; sys.argv[0] = 'fedsp'; main()"
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(settings(tmp_path, server={"steps": 2, "batch_size": 4})))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(config), "--engine", "flower"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert prompt_bits(tmp_path / "run") == prompt_bits(made[0].path)
    assert len(RunDirectory.open(tmp_path / "run").traffic()) == 18


def test_whoever_is_not_registered_or_does_not_speak_tls_is_refused(deployment: Deployment) -> None:
    other = deployment.place.parent / "other"
    init_federation(other, ["x"], f"localhost:{deployment.port}")
    make_client_credentials(deployment.place / "stranger", other / "server", "stranger")
    for name in ("party.toml", "questions.jsonl", "package", CA, "server.pub"):
        source, target = deployment.place / "client-0" / name, deployment.place / "stranger" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    shutil.copy(other / "server" / CA, deployment.place / "client-1" / CA)

    deployment.serve()
    until(lambda: "listening on" in deployment.said("server"))
    stranger, astray = deployment.join("stranger", 5.0), deployment.join("client-1")
    assert exited(
        stranger, 90
    ) == 2 and "its key is not in the server's register" in deployment.said("stranger"), (
        deployment.said("stranger")
    )
    assert exited(astray, 90) == 2 and "does not verify against ca.crt" in deployment.said(
        "client-1"
    ), deployment.said("client-1")

    trusted = ssl.create_default_context(cafile=str(deployment.place / "server" / CA))
    address = f"localhost:{deployment.port}"
    with httpx.Client(verify=trusted) as client:
        for api in (
            "control/start-run",
            "control/list-nodes",
            "control/register-node",
            "runtime/pull-task-input",
            "",
        ):
            assert client.post(f"https://{address}/v1/{api}", content=b"").status_code == 404, api
        assert client.get(f"https://{address}/v1/fleet/pull-messages").status_code == 404
    for path in (
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1//control/start-run",
    ):
        raw = http.client.HTTPSConnection("localhost", deployment.port, context=trusted)
        raw.request("POST", path, b"")
        assert raw.getresponse().status == 404, path
    assert call_unsigned(deployment, trusted) == 401
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"http://{address}/v1/fleet/pull-messages", content=b"")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(
            f"https://{address}/v1/fleet/pull-messages",
            content=b"",
            verify=ssl.create_default_context(cafile=str(other / "server" / CA)),
        )


def call_unsigned(deployment: Deployment, trusted: ssl.SSLContext) -> int:
    """The status of a well-formed call to the Fleet API that nobody has signed."""
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    body = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    headers = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    return httpx.post(
        f"https://localhost:{deployment.port}/v1/fleet/pull-messages",
        content=body,
        headers=headers,
        verify=trusted,
    ).status_code


def test_a_simulation_refuses_a_federation(made: Any) -> None:
    with pytest.raises(Exception, match="run it with `fedsp serve`"):
        commands.run(
            make_config(
                {
                    "model": {"name": "embedded"},
                    "distill": {"text": ["x"]},
                    "federation": {"folder": "x"},
                }
            ),
            engine="flower",
        )
