"""Inside the encoder: tokens, weights, forward passes, and what decides a vector."""
