"""Layers of other implementations, read, folded and trained further."""
