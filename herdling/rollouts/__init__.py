"""Tasks played with the engine: what evaluation scores and what RL learns from."""
