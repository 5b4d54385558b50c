"""One file a question of the source document."""
