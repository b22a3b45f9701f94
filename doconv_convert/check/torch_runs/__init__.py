"""What torch computes for the checks; nothing else in `check` imports torch."""
