"""The model that ships with the package."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent / "world-qwen2-1m"
"""Folder of a transformers model that knows the world of ``molf.world``; see its README.md."""
