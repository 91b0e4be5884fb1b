"""The ServerApp and ClientApp, at module level where Flower looks for them. In a deployment they
forward messages to `fedsp serve` or `fedsp join`; otherwise they run a simulation."""

import os

from flwr.serverapp import ServerApp

from fedsp.deployment.grid import make_client_app
from fedsp.deployment.ipc import SOCKET

if SOCKET in os.environ:
    from fedsp.deployment.grid import handle_client_message, server_main
else:
    from fedsp.deployment.simulation import handle_client_message, server_main

server_app = ServerApp()
server_app.main()(server_main)
client_app = make_client_app(handle_client_message)
