"""What is sent to a server besides what its document allows."""
