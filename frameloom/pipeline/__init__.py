"""The order of work: from a prompt to frames, and from frames to a file."""
