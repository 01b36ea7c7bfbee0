"""Jobs: kept, waiting, handed to workers, ended; and the folder of their files."""
