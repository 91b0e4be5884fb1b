"""How requests and updates travel."""
