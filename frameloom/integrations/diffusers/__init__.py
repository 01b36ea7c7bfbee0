"""A live Diffusers pipeline, computed by the networks here; the only room that imports Diffusers."""
