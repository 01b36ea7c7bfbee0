"""One plain PyTorch function per operation: the specification, the fallback and the oracle of faster ones."""
