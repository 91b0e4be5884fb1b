"""The small model and the data that come with fedsp."""

from pathlib import Path

EMBEDDED = Path(__file__).parent
