"""The model: configuration, decoder, vision encoder, cache, weights."""
