"""Gradient steps and scores."""
