"""Thin commands over the library. Nothing here loads torch, transformers or pydantic before a command needs it."""
