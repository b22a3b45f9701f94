"""The door: one thin file a command. Nothing here imports torch before a command starts to work."""
