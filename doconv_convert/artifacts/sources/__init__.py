"""Sources: what builds a model, and the inputs it takes."""
