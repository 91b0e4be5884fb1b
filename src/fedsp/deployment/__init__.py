"""Real machines: Flower, keys and sockets."""
