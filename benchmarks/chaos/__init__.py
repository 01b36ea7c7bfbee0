"""Who is at a server while it is struck, and what they were told."""
