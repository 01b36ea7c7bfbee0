"""What carries this engine into other programs."""
