"""Simulated scenes behind the Gymnasium API. Knows tasks; nothing of policies, experts or files."""
