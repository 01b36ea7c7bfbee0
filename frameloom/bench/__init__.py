"""Benchmarks against Diffusers with the same weights: the VAE, the transformer, whole requests."""
