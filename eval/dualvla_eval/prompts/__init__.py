"""Texts of the judges' prompts, read with importlib.resources. Their digest is part of a judge's identity."""
