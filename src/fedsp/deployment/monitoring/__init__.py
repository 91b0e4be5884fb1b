"""How a deployment is: a client's way to the server, and what a machine's monitoring reads."""
