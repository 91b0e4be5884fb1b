"""Audits of finished runs: what a client learns of the model, and what others learn of the text."""
