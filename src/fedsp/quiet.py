"""No library underneath tells its makers of a run."""

from __future__ import annotations

QUIET = {
    "DO_NOT_TRACK": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What keeps the libraries underneath from telling their makers of a run. Read when each is imported, so it is set before any is, and whatever was set before."""
