"""How much of a video's latents is in memory at a time, while they are denoised and while they are decoded."""

import gc
import itertools

import pytest
import torch
from checkpoints import VAE_21

from frameloom.memory.meter import peak_bytes
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec, VaeSpec
from frameloom.models.vae_state import Passage
from frameloom.models.wan_dit import WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.pipeline import stages
from frameloom.pipeline.keep import FORGETS, Forgets
from frameloom.pipeline.windows import Windows
from frameloom.sampling.guidance import ExpertSwitch
from frameloom.sampling.unipc import make_sampler
from frameloom.sampling.windows import windows_over

SHAPE = (1, 4, 16, 16, 16)
ONE = 4 * 4 * 16 * 16 * 16  # bytes
STEPS = 4
FLOW = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}


SPEC = TransformerSpec(
    num_attention_heads=1, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=8,
    num_layers=1,
)  # fmt: skip


def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def denoised(dit, make, keeper=FORGETS):
    text = torch.zeros(1, 1, 8)
    prompts = stages.Prompts(text_BSE=text, negative_BSE=text, make_predictor=make)
    return stages.denoise(
        [dit],
        noise,
        prompts,
        sampler=make_sampler(FLOW, STEPS),
        switch=ExpertSwitch(guidance_scale=4.0),
        per_token=False,
        on_step=lambda _: None,
        keeper=keeper,
    )


def tensors_of(shape):
    """How many are there, of those that are somewhere in memory."""
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == shape]
    return len({x.untyped_storage().data_ptr() for x in found})


class Counts(Forgets):
    """Begins in the middle, as a run that is gone on with; `counts`: tensors that are there in each step."""

    def __init__(self, first=0):
        self.first, self.counts = first, []

    def walked(self):
        if not self.first:
            return None
        sampler = make_sampler(FLOW, STEPS)
        x, state = noise(), sampler.start()
        for _ in range(self.first):
            x, state = sampler.step(x * 2, x, state)
        return x.clone(), state

    def make(self, *_):
        """A predictor."""

        def predict(_expert, x_BCTHW, _timestep):
            self.counts.append(tensors_of(SHAPE))
            return [x_BCTHW * 2, x_BCTHW * 3]

        return predict


@pytest.fixture
def unused():
    """A network of which no line is run."""
    with on_meta():
        return WanDiT(SPEC)


@pytest.mark.parametrize(("first", "counts"), [(0, [1, 3, 4, 4]), (2, [4, 4])])
def test_while_the_network_computes_there_are_the_latents_and_the_history_alone(unused, first, counts):
    """Of a resumed run, too."""
    keeper = Counts(first)
    denoised(unused, keeper.make, keeper)
    assert keeper.counts == counts


def test_a_step_of_the_sampler_takes_ten_tensors_of_that_size_at_most(unused):
    assert 4 * ONE < peak_bytes(lambda: denoised(unused, Counts().make)) < 10 * ONE


def test_windows_add_the_blends_of_both_branches():
    torch.manual_seed(0)
    dit, counts = WanDiT(SPEC).eval(), []
    run_blocks = dit.run_blocks

    def counting(*inputs):
        counts.append(tensors_of(SHAPE))
        return run_blocks(*inputs)

    dit.run_blocks = counting
    windows = Windows(each=windows_over(SHAPE[2] - 1, 8, 1))
    denoised(dit, windows.predictor(stages.Predictor))
    assert max(counts) == 4 + 2


def test_decoding_takes_the_same_memory_for_any_number_of_frames():
    torch.manual_seed(0)
    vae = WanVAE(VaeSpec.from_config({**VAE_21, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4})).eval()

    def first_frames(z_BCTHW):
        for _ in itertools.islice(stages.decode(vae, z_BCTHW, iter([Passage()]), lambda _: None), 3):
            pass

    short, long = (torch.randn(1, 4, frames, 2, 2) for frames in (9, 20_000))
    needed = peak_bytes(lambda: first_frames(short))
    assert peak_bytes(lambda: first_frames(long)) == needed < long.nbytes
