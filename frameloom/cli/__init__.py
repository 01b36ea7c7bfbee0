"""The `frameloom` command: generate, inspect, prove. The only room that prints, and the only one with exit codes."""

from frameloom.cli.app import main

__all__ = ["main"]
