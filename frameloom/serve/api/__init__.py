"""The HTTP API: routes, what bodies say, pictures of strangers, answers and errors."""
