"""Checkpoints: what is read and written, ours and other people's."""
