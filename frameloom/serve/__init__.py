"""The server: a video API that loses nothing, and a page. Torch-free; workers are processes of their own."""
