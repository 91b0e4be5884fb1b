"""Serving what was tuned: an HTTP server with the endpoints that clients of OpenAI's API use."""
