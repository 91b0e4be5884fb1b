"""Aggregation of the clients' updates into one."""
