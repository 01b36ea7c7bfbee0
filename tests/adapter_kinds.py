"""Random adapters of every kind, for tests: `for_all(network, a_lora)` changes all of its parameters."""

import torch

from frameloom.models.adapters import Adapter, Adapters, Pair, Product

RANK = 3


def random(*shape):
    return torch.randn(shape) / 4


def low_rank(weight):
    return Product(a=random(weight.shape[0], RANK), b=random(RANK, weight[0].numel()))


def a_lora(weight):
    return Adapter(factors=low_rank(weight), scale=0.5)


def a_loha(weight):
    return Adapter(factors=Pair(left=low_rank(weight), right=low_rank(weight), join=torch.mul))


def a_lokr(weight):
    rows, columns = weight.shape[0] // 4, weight[0].numel() // 2
    return Adapter(factors=Pair(left=Product(a=random(4, 2)), right=Product(a=random(rows, columns)), join=torch.kron))


def a_difference(weight):
    return Adapter(factors=Product(a=random(*weight.shape)))


def a_dora(weight):
    rows = weight.shape[0], *(1 for _ in weight.shape[1:])
    return Adapter(factors=low_rank(weight), scale=0.5, magnitude=1 + random(*rows).abs())


def a_dora_of_columns(weight):
    return Adapter(factors=low_rank(weight), magnitude=1 + random(1, weight.shape[1], *(1,) * (weight.ndim - 2)).abs())


def a_replacement(weight):
    return Adapter(factors=Product(a=random(*weight.shape)), replaces=True)


KINDS = (a_lora, a_loha, a_lokr, a_difference, a_dora, a_dora_of_columns, a_replacement)


def for_all(dit, make, *, strength=0.6, parameters=lambda name: True):
    """Adapters of one kind for every weight matrix, and differences for everything else."""
    changes = {
        name: make(value) if value.ndim > 1 and name.endswith("weight") else a_difference(value)
        for name, value in dit.state_dict().items()
        if parameters(name)
    }
    return Adapters(name=make.__name__, strength=strength, changes=changes, num_keys=len(changes))
