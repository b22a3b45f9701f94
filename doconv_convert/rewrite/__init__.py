"""The rewriting: where the convolutions are, the two fx passes, and what carries them to any module."""
