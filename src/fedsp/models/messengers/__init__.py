"""What travels: a register by name, and how both sides make it."""
