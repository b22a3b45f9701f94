"""The paper: kernel and feature composition as pure functions, and the layers over them."""
