"""Where weights are, in which order they come, how many bytes that takes, and what is chosen for a given memory."""

import itertools

import pytest
import torch

from frameloom.config import residences
from frameloom.errors import RequestError
from frameloom.memory.residency import (
    Footprint,
    chain_of_dit,
    chain_of_text_encoder,
    resident_bytes,
)
from frameloom.memory.stream import block_by_block
from frameloom.models.spec import TransformerSpec, VaceSpec
from frameloom.models.umt5 import Umt5Encoder, Umt5Spec
from frameloom.models.vace import make_dit, under_empty_control
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.quantized import Linear
from frameloom.types import Residence

SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 12,
    "freq_dim": 16, "ffn_dim": 40, "num_layers": 4,
}  # fmt: skip
SPECS = {
    "plain": TransformerSpec(**SMALL),
    "image": TransformerSpec(**SMALL, image_dim=8, added_kv_proj_dim=32),
    "vace": VaceSpec(**SMALL, vace_layers=(0, 1, 3), vace_in_channels=6),
}
TEXT = Umt5Spec(vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4)
RESIDENT, MOVED, STREAMED = Residence


@pytest.fixture(params=SPECS.values(), ids=SPECS)
def dit(request):
    torch.manual_seed(0)
    return make_dit(request.param).eval()


def weights_of_blocks(network, start):
    linear = (name for name, module in network.named_modules() if isinstance(module, Linear))
    return sorted(f"{name}.weight" for name in linear if name.startswith(start))


def test_every_weight_of_the_blocks_comes_in_one_unit(dit):
    chain = chain_of_dit(dit)
    assert sorted(name for unit in chain.units for name in unit) == weights_of_blocks(dit, ("blocks", "vace_blocks"))
    encoder = Umt5Encoder(TEXT)
    chain = chain_of_text_encoder(encoder)
    assert sorted(name for unit in chain.units for name in unit) == weights_of_blocks(encoder, "encoder.block")


@torch.inference_mode()
def test_units_come_in_the_order_in_which_the_network_needs_them(dit):
    chain = chain_of_dit(dit)
    unit_of = {name: index for index, unit in enumerate(chain.units) for name in unit}
    needed = []
    for path, module in dit.named_modules():
        if (index := unit_of.get(f"{path}.weight")) is not None:
            module.register_forward_hook(lambda *_, index=index: needed.append(index))
    dit.run_blocks = block_by_block
    x, image = torch.randn(1, 4, 1, 4, 4), None
    if dit.spec.image_dim is not None:
        image = torch.randn(1, 5, dit.spec.image_dim)
    prompts = [dit.read_prompt(torch.randn(1, 5, 12), image) for _ in range(2)]
    assert list(dict.fromkeys(needed)) == list(range(chain.cycle_from))
    needed.clear()
    control = under_empty_control(prompts[0], dit, x).control
    dit.velocities(x, torch.tensor([1.0]), [prompt._replace(control=control) for prompt in prompts])
    assert list(dict.fromkeys(needed)) == list(range(chain.cycle_from, len(chain.units)))
    reach = max(abs(a - b) for a, b in itertools.pairwise(needed))
    assert reach < chain.slots, "what is needed again soon is still there"


def test_bytes_are_those_of_the_parameters():
    dit = WanDiT(SPECS["plain"])
    footprint = Footprint.of(dit, chain_of_dit(dit), lambda _, value: value.nbytes)
    whole = sum(value.nbytes for value in dit.parameters())
    block = sum(dit.get_parameter(f"blocks.0.{name}").nbytes for name in names_of_steps())
    assert resident_bytes(footprint, RESIDENT) == resident_bytes(footprint, MOVED) == whole
    assert resident_bytes(footprint, STREAMED) == footprint.stays + 2 * block
    assert resident_bytes(footprint, STREAMED, in_its_stage=False) == footprint.stays
    assert resident_bytes(footprint, RESIDENT, in_its_stage=False) == whole
    assert 0 < footprint.stays < whole - sum(footprint.units) + 1


def names_of_steps():
    chain = chain_of_dit(WanDiT(SPECS["plain"]))
    return [name.removeprefix("blocks.0.") for name in chain.units[chain.cycle_from]]


def test_of_a_table_no_more_than_rows_are_there_unless_it_is_resident():
    encoder = Umt5Encoder(TEXT)
    footprint = Footprint.of(encoder, chain_of_text_encoder(encoder), lambda _, value: value.nbytes)
    assert footprint.tables == encoder.shared.weight.nbytes
    table = resident_bytes(footprint, RESIDENT) - resident_bytes(footprint, MOVED)
    assert table == footprint.tables


def test_texts_name_components_and_residences():
    assert residences("auto") == {}
    assert residences("text=moved, transformer=streamed") == {"text": MOVED, "transformer": STREAMED}
    assert residences("transformer=resident") == {"transformer": RESIDENT}


@pytest.mark.parametrize("text", ["", "text", "text=away", "vae=moved", "text=moved,text=moved", "text=moved,", None])
def test_other_texts_are_refused_with_what_is_possible(text):
    with pytest.raises(RequestError, match=r"for text and transformer one of resident, moved, streamed each"):
        residences(text)
