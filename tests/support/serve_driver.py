"""`fedsp serve` that kills itself at a boundary of a round, and whose proxy writes down every byte
that it sends.

    python serve_driver.py KILL RECORD serve run.toml

KILL is `nothing`, or a boundary and a round such as `before-broadcast:2`; RECORD is a file, or
`nothing`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

BOUNDARIES = (
    "before-broadcast",
    "after-one-reply",
    "after-aggregation",
    "before-checkpoint",
    "after-checkpoint",
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(boundary: str, round: int, link: Any) -> None:
    """Make this process kill itself, as `kill -9` would, at a boundary of a round whose messages
    pass a link of this class."""
    from fedsp.experiments import run_directory as runs
    from fedsp.federation.aggregation import mean as aggregation
    from fedsp.federation.transport import remote

    if boundary == "before-broadcast":
        push = link.push

        def dying_push(self: Any, sends: Any, group: str, *rest: Any) -> list[str]:
            if group == str(round):
                die()
            return list(push(self, sends, group, *rest))

        link.push = dying_push
    elif boundary == "after-one-reply":
        read, counted = getattr(remote, "read_reply"), [0]

        def dying_read(message: Any, request: Any) -> Any:
            counted[0] += request.round == round
            if counted[0] == 2:
                die()
            return read(message, request)

        setattr(remote, "read_reply", dying_read)
    elif boundary == "after-aggregation":
        mean = getattr(aggregation, "weighted_mean")

        def dying_mean(*arguments: Any) -> None:
            mean(*arguments)
            die()

        setattr(aggregation, "weighted_mean", dying_mean)
    else:
        write = getattr(runs, "write_tensors")

        def dying_write(path: Path, *arguments: Any) -> str:
            here = (
                path.name == f"round-{round:05d}.safetensors" and path.parent.name == "checkpoint"
            )
            if here and boundary == "before-checkpoint":
                die()
            digest = write(path, *arguments)
            if here:
                die()
            return str(digest)

        setattr(runs, "write_tensors", dying_write)


def record(file: str) -> None:
    """Put a proxy in the proxy's place that appends every body it sends to `file`."""
    from fedsp.deployment import serve as deployment

    usual = deployment.proxy_command
    setattr(
        deployment,
        "proxy_command",
        lambda *arguments: [sys.executable, __file__, "proxy", file, *usual(*arguments)[4:]],
    )


def recording_proxy(
    file: str, host: str, port: str, superlink: str, folder: str, counts: str
) -> None:
    """The proxy, with a copy of all that clients are sent."""
    from fedsp.deployment import fleet_proxy as proxy

    class Recording(proxy.FleetProxy):
        async def _answer(self, scope: Any, receive: Any) -> Any:
            answered = await super()._answer(scope, receive)
            with open(file, "ab") as copy:
                copy.write(answered[2])
            return answered

    setattr(proxy, "FleetProxy", Recording)
    proxy.main(host, int(port), int(superlink), Path(folder), Path(counts))


if __name__ == "__main__":
    if sys.argv[1] == "proxy":
        recording_proxy(*sys.argv[2:])
        sys.exit(0)
    kill, copy, *command = sys.argv[1:]
    if kill != "nothing":
        from fedsp.deployment.ipc import SocketLink

        arm(kill.split(":")[0], int(kill.split(":")[1]), SocketLink)
    if copy != "nothing":
        record(copy)
    if os.environ.get("HOSTILE"):
        from fedsp.deployment import serve as deployment

        setattr(deployment, "APP", Path(os.environ["HOSTILE"]))
    from fedsp.cli import main

    sys.argv = ["fedsp", *command]
    main()
