"""Weights divided over ranks at rest: the bits of one rank, a share of its memory, and what must be left alone."""

import gc
import weakref

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from test_tensor import CASES, SIZE, Case, digest, in_pieces_choices, narrowed, predictions, random_dit, small_spec
from torch.distributed.tensor import DTensor

from frameloom.errors import RequestError
from frameloom.models.dit_fast import choose, install
from frameloom.models.encoders import TIED, build_text_encoder, text_encoder_keeps_fp32
from frameloom.models.meta import on_meta
from frameloom.models.umt5 import Umt5Encoder, Umt5Spec
from frameloom.models.wan_dit import WanDiT
from frameloom.ops.dit_ops import Ops
from frameloom.ops.registry import Policy, make_policy
from frameloom.parallel.sequence import SequenceParallel
from frameloom.parallel.weights import (
    REFUSED,
    check_sharded_plan,
    own_shard,
    read_when_used,
    shard_dit,
    shard_text_encoder,
    sharded_policy,
)
from frameloom.platform.tuning import Tuner
from frameloom.types import ParallelPlan
from frameloom.weights.load import load_module

CPU = torch.device("cpu")
UNEVEN = Case(small_spec(num_attention_heads=3, attention_head_dim=10, ffn_dim=5), batch=2)  # a rank of 4 has nothing


def bytes_at_rest(module):
    """Bytes of the weights that this rank holds between computations."""
    weights = set(module.parameters())
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in weights)


def sharded(dit, team, choices):
    shard_dit(dit, team, CPU)
    install(dit, choices)
    read_when_used(dit)
    return dit


@torch.inference_mode()
def compares(world, dtype):
    """For every case: whether the results are the same to the bit, twice; every rank has inputs of its own."""
    choices = in_pieces_choices(dtype)
    found = []
    for case in (*CASES.values(), UNEVEN):
        whole, dit = (narrowed(random_dit(case.spec), dtype) for _ in range(2))
        install(whole, choices)
        expected = predictions(whole, case, seed=world.rank)
        sharded(dit, world.everyone, choices)
        found += [digest(predictions(dit, case, seed=world.rank)) == digest(expected) for _ in range(2)]
    return found


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
def test_the_bits_are_those_of_whole_weights(count: int, dtype: torch.dtype) -> None:
    assert run_ranks(count, compares, dtype) == [[True] * 2 * (len(CASES) + 1)] * count


@torch.inference_mode()
def forgets_to_read_late(world):
    dit = random_dit(small_spec())
    shard_dit(dit, world.everyone, CPU)
    install(dit, in_pieces_choices())
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        predictions(dit, CASES["t2v"])


def test_a_kernel_that_kept_the_weights_it_saw_at_rest_fails() -> None:
    run_ranks(2, forgets_to_read_late)


def live_bytes():
    gc.collect()  # else what is measured first holds garbage of earlier tests
    storages = {
        (storage := x.untyped_storage()).data_ptr(): storage.nbytes()
        for x in gc.get_objects()
        if type(x) in (torch.Tensor, torch.nn.Parameter)
    }
    return sum(storages.values())


@torch.inference_mode()
def remembers(world):
    """Bytes at rest, what a block adds to all tensors at most, and the sizes of the network and its largest layer."""
    spec = small_spec(num_attention_heads=8, ffn_dim=512, num_layers=6)
    dit = random_dit(spec)
    whole, largest = bytes_at_rest(dit), bytes_at_rest(dit.blocks[0].ffn)
    sharded(dit, world.everyone, in_pieces_choices())
    inputs = torch.randn(1, 4, *SIZE), torch.tensor([500.0]), torch.randn(1, 5, 20)
    dit(*inputs)
    before, seen = live_bytes(), []
    for layer in (dit.blocks[4].attn1.out, dit.blocks[4].attn2.out, dit.blocks[4].ffn):
        layer.register_forward_hook(lambda *_: seen.append(live_bytes() - before))
    dit(*inputs)
    return bytes_at_rest(dit), seen, whole, largest


def test_each_rank_holds_a_share_and_gathers_a_layer_at_a_time() -> None:
    for rest, (*_, gathered), whole, largest in run_ranks(4, remembers):
        assert rest < 0.28 * whole
        assert largest <= gathered < 2.5 * largest < 0.5 * whole


def dit_of(world, spec, file, earlier):
    with on_meta():
        dit = WanDiT(spec).eval()
    shard_dit(dit, world.everyone, CPU)
    take = watched(own_shard(dit), earlier)
    load_module(dit, [file], dtype=torch.bfloat16, keep=WanDiT.keep_in_fp32, take=take)
    return dit


def watched(take, earlier):
    def watching(name, whole):
        assert not any(reference() is not None for reference in earlier), "an earlier tensor was kept whole"
        part = take(name, whole)
        if part is not whole:
            earlier.append(weakref.ref(whole))
        return part

    return watching


@torch.inference_mode()
def loads(world, files):
    same, cut = [], []
    for case, file in zip((CASES["image"], UNEVEN), files, strict=True):
        earlier = []
        dit = dit_of(world, case.spec, file, earlier)
        rest = bytes_at_rest(dit)
        install(dit, in_pieces_choices(torch.bfloat16))
        read_when_used(dit)
        whole = narrowed(random_dit(case.spec), torch.bfloat16)
        install(whole, in_pieces_choices(torch.bfloat16))
        same.append(digest(predictions(dit, case)) == digest(predictions(whole, case)))
        cut.append((len(earlier), rest < 0.36 * bytes_at_rest(whole)))
    return same, cut


def test_a_rank_reads_its_share_and_holds_one_whole_tensor_at_a_time(tmp_path) -> None:
    files = []
    for case in (CASES["image"], UNEVEN):
        files.append(tmp_path / f"{len(files)}.safetensors")
        save_file({name: p.detach() for name, p in random_dit(case.spec).named_parameters()}, files[-1])
    num_tensors = [2 * (10 + 8 + 2 + 2 + 4) + 10, 2 * (10 + 4 + 2 + 2 + 4) + 10]
    for same, cut in run_ranks(4, loads, files):
        assert same == [True, True]
        assert cut == [(count, True) for count in num_tensors]


TEXT = {"vocab_size": 50, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}


def random_encoder(dtype):
    torch.manual_seed(3)
    encoder = Umt5Encoder(Umt5Spec(**TEXT)).eval().requires_grad_(False)
    for name, parameter in encoder.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if text_encoder_keeps_fp32(dtype)(name) else dtype)
    return encoder


@torch.no_grad()
def reads_a_text(world, dtype, file):
    whole = random_encoder(dtype)
    encoder = build_text_encoder(TEXT)
    shard_text_encoder(encoder, world.everyone, CPU)
    keep = text_encoder_keeps_fp32(dtype)
    load_module(encoder, [file], dtype=dtype, keep=keep, tied=TIED, take=own_shard(encoder))
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    same = [torch.equal(encoder(ids, mask), whole(ids, mask)) for _ in range(2)]
    table = encoder.shared.weight
    return same, table.dtype == dtype, table.shape == (50, 24), bytes_at_rest(encoder) / bytes_at_rest(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_text_encoder_and_its_table_are_divided_too(dtype: torch.dtype, tmp_path) -> None:
    tensors = {name: p.detach().clone() for name, p in random_encoder(torch.float32).named_parameters()}
    save_file(tensors, tmp_path / "model.safetensors")
    for count in (2, 4):
        for same, right_dtype, right_shape, share in run_ranks(
            count, reads_a_text, dtype, tmp_path / "model.safetensors"
        ):
            assert same == [True, True]
            assert right_dtype
            assert right_shape
            assert share < 1.2 / count


def pairs(world):
    team = world.divide([(0, 1), (2, 3)])
    with torch.inference_mode():
        whole, dit = (random_dit(CASES["t2v"].spec) for _ in range(2))
        shard_dit(dit, team, CPU)
        return torch.equal(predictions(dit, CASES["t2v"]), predictions(whole, CASES["t2v"])), bytes_at_rest(dit)


def test_some_ranks_of_many_may_share() -> None:
    first, *others = run_ranks(4, pairs)
    assert first[0]
    assert others == [first] * 3


@torch.inference_mode()
def compares_with_divided_tokens(world):
    sequence = SequenceParallel(ulysses=world.divide([(0, 1), (2, 3)]), ring=world.divide([(0, 2), (1, 3)]))
    results = []
    for divides_weights in (False, True):
        dit = random_dit(CASES["image"].spec)
        if divides_weights:
            shard_dit(dit, world.everyone, CPU)
        sequence.install(dit)
        results.append(digest(predictions(dit, CASES["image"])))
    return results


def test_tokens_may_be_divided_as_well() -> None:
    for whole, shared in run_ranks(4, compares_with_divided_tokens):
        assert whole == shared


def test_rewrites_that_hold_weights_in_another_form_are_off(tmp_path) -> None:
    dit = random_dit(small_spec())
    policy = sharded_policy(Policy(forced={"dit.prompt_once": True}))
    choices = choose(dit, policy, Tuner(CPU, tmp_path), platform_name="cpu")
    assert not any((choices.fuses_qkv, choices.packs_linear, choices.packs_mlp))
    assert choices.ops.mlp is not Ops().mlp
    assert policy.forced["dit.prompt_once"]
    for name in REFUSED:
        with pytest.raises(RequestError, match=f"{name}=on is not possible here: .* divided over the ranks"):
            sharded_policy(make_policy("rounding", [f"{name}=on"], REFUSED))


def test_weights_are_divided_in_one_way() -> None:
    check_sharded_plan(ParallelPlan(fsdp=4, ulysses=4))
    check_sharded_plan(ParallelPlan(tp=4))
    with pytest.raises(RequestError, match="fsdp=4 and tp=2 do not go together"):
        check_sharded_plan(ParallelPlan(fsdp=4, tp=2, cfg=2))
