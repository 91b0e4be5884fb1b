"""The two apps, as Flower looks for them: plain statements. Beside a `fedsp serve` or `fedsp join` they carry; else they run a simulation."""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsp.deployment.grid import from_record, to_record
from fedsp.deployment.ipc import SOCKET

if SOCKET in os.environ:
    from fedsp.deployment.grid import follow, lead
else:
    from fedsp.deployment.simulation import follow, lead

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The owner of the model's side."""
    lead(grid, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """An owner of text's side."""
    return Message(content=to_record(follow(from_record(message.content), context)), reply_to=message)
