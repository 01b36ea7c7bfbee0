"""The networks, written to be read beside their papers: no device, rank or file format in here."""
