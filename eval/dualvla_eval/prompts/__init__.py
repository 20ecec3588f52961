"""Texts of the judges' prompts, read with importlib.resources. The digest of all of them is part of a judge's identity."""
