"""Dual-layer pruning (Sec. 3.2.1 of the paper). Knows numpy; never Ray."""
