"""Verifiable tasks: one object feeds training data, reward and evaluation."""
