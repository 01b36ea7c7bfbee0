"""Builds the networks of a checkpoint and runs requests on them."""
