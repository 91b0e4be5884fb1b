"""Reading text back from updates."""
