"""The training loop, its losses, and the health of a run."""
