"""fedsp."""
