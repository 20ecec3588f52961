"""Losses, teachers and the training step of dual-teacher distillation (Sec. 3.2.2). Never Ray."""
