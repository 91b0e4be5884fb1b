"""How messages move: the same federation in one process, in simulation, and over a network."""
