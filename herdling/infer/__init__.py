"""Running a model: sampling, generation, and the public `LM`."""
