"""One page per verb of the command line."""
