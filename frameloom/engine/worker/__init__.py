"""A worker of the server: an engine that carries out orders, `python -m frameloom.engine.worker`."""
