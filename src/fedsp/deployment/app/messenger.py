"""The ServerApp and ClientApp, at module level where Flower looks for them. In a deployment they
forward messages to `fedsp serve` or `fedsp join`; otherwise they run a simulation."""

import os

from flwr.app import Context
from flwr.app import Message as FlowerMessage
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsp.deployment.grid import from_record, to_record
from fedsp.deployment.ipc import SOCKET

if SOCKET in os.environ:
    from fedsp.deployment.grid import handle_client_message, server_main
else:
    from fedsp.deployment.simulation import handle_client_message, server_main

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """The owner of the model's side."""
    server_main(grid, context)


@client_app.train()
def train(flower_message: FlowerMessage, context: Context) -> FlowerMessage:
    """An owner of text's side."""
    return FlowerMessage(
        content=to_record(handle_client_message(from_record(flower_message.content), context)),
        reply_to=flower_message,
    )
