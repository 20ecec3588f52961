"""Readers of other people's data: LeRobot, RLDS, and VLA-IT annotations. They know nothing of Ray or of output."""
