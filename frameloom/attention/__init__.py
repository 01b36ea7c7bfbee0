"""softmax(QK)V and nothing else: the protocol, its backends, and the choice among them."""
