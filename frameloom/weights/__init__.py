"""Checkpoint files in, filled modules out: `source` opens and checks, `load` streams the weights."""
