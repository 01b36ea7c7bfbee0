"""Tensor parallelism: ranks that hold some heads each compute what one rank computes, in every way of the network."""

import copy
import hashlib
import weakref
from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file

from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_block import RMSNorm
from frameloom.models.dit_fast import DitChoices, install
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import FrameTimes, WanDiT
from frameloom.ops.dit_ops import Ops, ops_for
from frameloom.ops.registry import BF16_SLACK, relative_error
from frameloom.parallel.sequence import SequenceParallel
from frameloom.parallel.team import Team
from frameloom.parallel.tensor import check_tensor_plan, divide, join, own_part
from frameloom.weights.load import load_module

SIZE = (3, 4, 6)  # of the latent: 18 tokens


@dataclass(frozen=True)
class Case:
    """A network's oddities, and how its timesteps are given."""

    spec: TransformerSpec
    batch: int = 1
    frame_times: bool = False


def small_spec(**changes):
    base = {
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 20,
        "freq_dim": 32,
        "ffn_dim": 96,
        "num_layers": 2,
        "rope_max_seq_len": 16,
    }
    return TransformerSpec(**(base | changes))


CASES = {
    "t2v": Case(small_spec()),
    "batch": Case(small_spec(eps=1e-2), batch=2),
    "no-cross-norm": Case(small_spec(cross_attn_norm=False), batch=2),
    "image": Case(small_spec(in_channels=9, image_dim=24, added_kv_proj_dim=64), batch=2),
    "ti2v": Case(small_spec(), batch=2, frame_times=True),
}
PLAIN = DitChoices()


def fast_choices(dtype=torch.float32):
    ops, _ = ops_for("cpu", dtype=dtype)
    return DitChoices(ops=ops, collapses_padding=True, fuses_qkv=True, packs_linear=True, packs_mlp=True)


def in_pieces_choices(dtype=torch.float32):
    """The feed-forward for some tokens at a time, from weights in their own form."""
    return DitChoices(ops=ops_for("cpu", dtype=dtype)[0])


def random_dit(spec, seed=0):
    """Random weights under which biases, norms, the prompt and the image all matter."""
    torch.manual_seed(seed)
    dit = WanDiT(spec).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        parameter.copy_(random_parameter(name, parameter))
    return dit


def random_parameter(name, parameter):
    noise = torch.randn_like(parameter)
    if name.endswith("weight") and parameter.ndim == 1:
        return (3.0 if "attn2.norm" in name else 1.0) + 0.2 * noise  # sharp cross-attention
    if name.endswith("weight"):
        return noise * (2.0 if ".attn2." in name else 1.0) / parameter[0].numel() ** 0.5
    return 0.5 * noise


def narrowed(dit, dtype):
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if WanDiT.keep_in_fp32(name) else dtype)
    return dit


def predictions(dit, case, seed=1):
    """The velocities under two prompts one after the other, and together in one batch."""
    torch.manual_seed(seed)
    spec, batch = case.spec, case.batch
    x = torch.randn(batch, spec.in_channels, *SIZE)
    timestep = torch.tensor([999.0, 41.5])[:batch]
    if case.frame_times:
        timestep = FrameTimes(torch.stack((torch.zeros(batch), timestep), dim=1), torch.tensor([0, 1, 1]))
    texts = torch.randn(2, batch, 24, spec.text_dim)
    texts[:, :, 17:] = 0
    image = None if spec.image_dim is None else torch.randn(batch, 11, spec.image_dim)
    prompts = [dit.read_prompt(text, image) for text in texts]
    together = dit.read_prompt(texts.flatten(0, 1), None if image is None else image.repeat(2, 1, 1))
    return torch.cat([*dit.velocities(x, timestep, prompts), *dit.velocities(x, timestep, [together])])


def digest(x):
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def divided(dit, team, choices=PLAIN):
    dit = copy.deepcopy(dit)
    divide(dit, team)
    install(dit, choices)
    join(dit, team)
    return dit


@torch.inference_mode()
def errors(world):
    """Of every case in every way, against one rank in the plain way; and the digest of what came out."""
    found = {}
    for name, case in CASES.items():
        whole = random_dit(case.spec)
        expected = predictions(whole, case)
        pieces = {"pieces": in_pieces_choices()} if name == "batch" else {}
        for way, choices in {"plain": PLAIN, "fast": fast_choices(), **pieces}.items():
            got = predictions(divided(whole, world.everyone, choices), case)
            found[name, way] = relative_error(got, expected), digest(got)
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_every_case_in_every_way_equals_one_rank_and_all_ranks_agree_to_the_bit(count: int) -> None:
    first, *others = run_ranks(count, errors)
    assert {key: error for key, (error, _) in first.items() if error > 1e-5} == {}
    assert others == [first] * (count - 1)


@torch.inference_mode()
def errors_in_bf16(world):
    """The sum over some networks, of one rank and of all; each against one rank in float32."""
    alone, together = 0.0, 0.0
    case = CASES["image"]
    for seed in range(4):
        exact = random_dit(case.spec, seed)
        expected = predictions(exact, case)
        for choices in (PLAIN, fast_choices(torch.bfloat16)):
            narrow = narrowed(copy.deepcopy(exact), torch.bfloat16)
            together += relative_error(predictions(divided(narrow, world.everyone, choices), case), expected)
            install(narrow, choices)
            alone += relative_error(predictions(narrow, case), expected)
    return alone, together


@pytest.mark.parametrize("count", [2, 4])
def test_bf16_is_as_accurate_as_on_one_rank(count: int) -> None:
    for alone, together in run_ranks(count, errors_in_bf16):
        assert 8e-3 < alone < 0.8  # a real bf16 run, and not noise
        assert together <= BF16_SLACK * alone


@torch.inference_mode()
def errors_of_pairs(world):
    """Two pairs of ranks, as where the two predictions are divided, too: each pair has latents of its own."""
    pairs = [(0, 1), (2, 3)]
    case = CASES["batch"]
    whole = random_dit(case.spec)
    dit = divided(whole, world.divide(pairs))
    return relative_error(*(predictions(network, case, seed=world.rank // 2) for network in (dit, whole)))


def test_pairs_of_ranks_share_networks_of_their_own() -> None:
    assert max(run_ranks(4, errors_of_pairs)) <= 1e-5


@torch.inference_mode()
def errors_with_divided_tokens(world):
    case = CASES["image"]
    whole = random_dit(case.spec)
    expected = predictions(whole, case)
    across, alone = world.divide([(0, 2), (1, 3)]), world.divide([(rank,) for rank in range(4)])
    found = []
    for ulysses, ring in ((across, alone), (alone, across)):
        dit = divided(whole, world.divide([(0, 1), (2, 3)]), fast_choices())
        SequenceParallel(ulysses=ulysses, ring=ring).install(dit)
        found.append(relative_error(predictions(dit, case), expected))
    return found


def test_tokens_may_be_divided_as_well() -> None:
    for found in run_ranks(4, errors_with_divided_tokens):
        assert max(found) <= 1e-5


def norms_of_own_heads(dit):
    for block in dit.block_list:
        block.attn1.ops = Ops()


def cross_norms_of_own_heads(dit):
    for block in dit.block_list:
        for name in ("norm_q", "norm_k", "norm_added_k"):
            own = RMSNorm(block.attn2.get_submodule(name).weight.shape[0], dit.spec.eps)
            own.weight = block.attn2.get_submodule(name).weight
            block.attn2.add_module(name, own)


def biases_twice(dit):
    for name, parameter in dit.named_parameters():
        if name.endswith("bias_of_sum"):
            parameter.mul_(2)


def no_sums(dit):
    for block in dit.block_list:
        block.ffn._forward_hooks.clear()


FAULTS = (norms_of_own_heads, cross_norms_of_own_heads, biases_twice, no_sums)


@torch.inference_mode()
def errors_of_faults(world):
    case = CASES["image"]
    whole = random_dit(case.spec)
    expected = predictions(whole, case)
    found = []
    for fault in FAULTS:
        dit = divided(whole, world.everyone)
        fault(dit)
        found.append(relative_error(predictions(dit, case), expected))
    return found


def test_what_is_not_reduced_or_added_twice_is_seen() -> None:
    for found in run_ranks(2, errors_of_faults):
        assert min(found) > 1e-3, found


@torch.inference_mode()
def sent(world):
    case = CASES["batch"]
    dit = divided(random_dit(case.spec), world.everyone)
    x, timestep = torch.randn(2, 4, *SIZE), torch.tensor([999.0, 41.5])
    counts = []
    prompt = []
    for run in (
        lambda: prompt.append(dit.read_prompt(torch.randn(2, 24, 20))),
        lambda: dit.velocities(x, timestep, prompt),
    ):
        before = world.sent_bytes
        run()
        counts.append(world.sent_bytes - before)
    return counts


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_send_three_sums_and_three_mean_squares_a_block(count: int) -> None:
    spec, samples, tokens = CASES["batch"].spec, 2, 18
    share = 2 * (count - 1) / count * 4 * spec.num_layers  # bytes of a number that all ranks add up
    assert run_ranks(count, sent) == [[share * samples * 24, share * samples * tokens * (3 * spec.dim + 3)]] * count


@torch.inference_mode()
def loads(world, file):
    """Whether the network read part by part is the one cut in memory, and how much of it was in memory at most."""
    spec, team = CASES["image"].spec, world.everyone
    with on_meta():
        dit = WanDiT(spec).eval()
    held, most, earlier = 0, 0, []

    def take(name, whole):
        nonlocal held, most
        assert not any(reference() is not None for reference in earlier), "an earlier tensor was kept whole"
        part = own_part(name, whole, team=team)
        most = max(most, held + whole.nbytes)
        held += whole.nbytes if part is whole else part.untyped_storage().nbytes()  # the whole lies in a mapped file
        if part is not whole:
            earlier.append(weakref.ref(whole))
        return part

    report = load_module(dit, [file], take=take)
    divide(dit, team)
    expected = random_dit(spec)
    divide(expected, team)
    same = all(torch.equal(p, expected.get_parameter(name)) for name, p in dit.named_parameters())
    return same, report.size_bytes == held, held, most


def test_a_rank_reads_its_part_and_never_holds_more_than_that_and_one_tensor(tmp_path) -> None:
    with torch.inference_mode():
        whole = random_dit(CASES["image"].spec)
    tensors = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    all_bytes = sum(tensor.nbytes for tensor in tensors.values())
    cut_bytes = sum(t.nbytes for name, t in tensors.items() if own_part_shape(name, t, 4) != t.shape)
    for same, counted, held, most in run_ranks(4, loads, tmp_path / "model.safetensors"):
        assert same
        assert counted
        assert held == all_bytes - cut_bytes * 3 // 4
        assert most <= held + max(tensor.nbytes for tensor in tensors.values())


def own_part_shape(name, tensor, size):
    return own_part(name, tensor, team=Team(range(size), 0, None)).shape


def test_every_layer_of_every_block_is_cut_and_nothing_else() -> None:
    spec = CASES["image"].spec
    with on_meta():
        whole = dict(WanDiT(spec).named_parameters())
    cut = {name for name, parameter in whole.items() if own_part_shape(name, parameter, 2) != parameter.shape}
    matrices = {name for name, parameter in whole.items() if name.startswith("blocks.") and parameter.ndim == 2}
    kept = {name for name in whole if name.endswith(("to_out.0.bias", "net.2.bias", "scale_shift_table"))}
    assert matrices <= cut
    assert {name for name in whole if name.startswith("blocks.") and ".norm2." not in name} - kept == cut
    assert len(matrices) == 12 * spec.num_layers


@pytest.mark.parametrize(
    ("heads", "ffn", "tp", "near"), [(40, 13824, 16, 8), (12, 8960, 3, 4), (12, 8960, 8, 4), (40, 13824, 5, 4)]
)
def test_ranks_that_cannot_share_equally_are_refused(heads: int, ffn: int, tp: int, near: int) -> None:
    spec = TransformerSpec(num_attention_heads=heads, ffn_dim=ffn)
    check_tensor_plan(spec, near)
    with pytest.raises(RequestError, match=f"tp={tp} does not divide .*{heads} heads.*{ffn}.*; use tp={near}$"):
        check_tensor_plan(spec, tp)


def joins_what_is_whole(dit, team):
    join(dit, team)


def joins_twice(dit, team):
    divide(dit, team)
    join(dit, team)
    join(dit, team)


def divides_what_fits_nothing(dit, team):
    dit.blocks[1].attn2.to_k.weight.data = torch.zeros(5, 64)
    divide(dit, team)


BUGS = {
    joins_what_is_whole: "0 layers divided by rows where 6 were expected",
    joins_twice: "0 norms of one rank where 4 were expected",
    divides_what_fits_nothing: "blocks.1.attn2.to_k.weight has shape (5, 64), neither (64, 64) nor (32, 64)",
}


def messages_of_bugs(world):
    found = []
    for bug in BUGS:
        with pytest.raises(InternalError) as error:
            bug(random_dit(small_spec()), world.everyone)
        found.append(str(error.value))
    return found


def test_a_network_that_was_not_divided_or_joined_once_is_a_bug() -> None:
    assert run_ranks(2, messages_of_bugs) == [list(BUGS.values())] * 2
