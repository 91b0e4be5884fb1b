"""Federated rounds: methods, parties, aggregation, compression and transport."""
