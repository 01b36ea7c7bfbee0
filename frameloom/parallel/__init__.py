"""Several devices, one video: the only room that says torch.distributed."""
