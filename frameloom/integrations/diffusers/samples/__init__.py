"""Small random pipelines of every class of Diffusers that carries what is taken over: for tests, timings and proof."""
