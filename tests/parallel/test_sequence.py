"""The denoiser with its tokens over several ranks: every way and product of ways gives the velocity of one rank."""

import dataclasses
import hashlib
import math

import pytest
import torch
from ranks import run_ranks

from frameloom.attention.core import sdpa
from frameloom.errors import InternalError, RequestError
from frameloom.models.dit_fast import DitChoices, install
from frameloom.models.spec import TransformerSpec
from frameloom.models.wan_dit import FrameTimes, WanDiT
from frameloom.ops.dit_ops import Ops, ops_for
from frameloom.ops.native import native
from frameloom.ops.registry import BF16_SLACK, ROUNDING_FP32, relative_error
from frameloom.parallel.sequence import SequenceParallel, attend_around, attend_by_heads, check_heads, divide_frames
from frameloom.parallel.team import Team

ALONE = Team((0,), 0, None)
PRODUCTS = [(1, 2), (1, 3), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)]  # ring, ulysses
HEADS, HEAD_DIM, LAYERS = 5, 16, 2
GRID = (3, 5, 7)  # 35 tokens of a frame, which divide by none of the ranks, as the 5 heads


def sequence(world, ring: int, ulysses: int, **options) -> SequenceParallel:
    places = [tuple(range(r * ulysses, (r + 1) * ulysses)) for r in range(ring)]
    teams = {"ulysses": world.divide(places), "ring": world.divide(list(zip(*places, strict=True)))}
    return SequenceParallel(**teams, **options)


def random_dit(seed: int = 0, **changes) -> WanDiT:
    """Weights under which every token, the prompt and the timestep matter."""
    spec = TransformerSpec(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=40,
        num_layers=LAYERS,
        **changes,
    )
    torch.manual_seed(seed)
    dit = WanDiT(spec).eval()
    for name, parameter in dit.named_parameters():
        noise = torch.randn_like(parameter)
        is_gain = name.endswith("weight") and parameter.ndim == 1
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data = 2.0 + 0.2 * noise if is_gain else noise * scale
    return dit


def in_bfloat16(dit: WanDiT) -> WanDiT:
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else torch.bfloat16)
    return dit


def fast(dit: WanDiT) -> WanDiT:
    ops, _ = ops_for("cpu")
    install(dit, DitChoices(ops=ops, collapses_padding=True, fuses_qkv=True, packs_linear=True, packs_mlp=True))
    return dit


def inputs(grid=GRID, batch=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    x = torch.randn(batch, 4, frames, 2 * height, 2 * width, generator=generator)
    texts = torch.randn(2, batch, 20, 12, generator=generator)
    texts[0, :, 9:] = 0
    texts[1, :, 4:] = 0
    return x, texts


def two_branches(dit, timestep=None, grid=GRID, batch=2):
    """Both branches of the guidance in one call, as the shared first half of the first block wants it."""
    x, texts = inputs(grid, batch)
    t = torch.tensor([900.0, 41.5])[:batch] if timestep is None else timestep
    return torch.stack(dit.velocities(x, t, [dit.read_prompt(text) for text in texts]))


def one_batch(dit):
    """Both branches as one batch: a prompt of twice the samples."""
    x, texts = inputs()
    (both,) = dit.velocities(x, torch.tensor([900.0, 41.5]), [dit.read_prompt(torch.cat(list(texts)))])
    return both


def per_frame(dit):
    return two_branches(dit, FrameTimes(torch.tensor([[0.0, 900.0], [0.0, 300.0]]), torch.tensor([0, 1, 1])))


def per_token(dit):
    t = torch.linspace(0, 999, 2 * math.prod(GRID)).view(2, -1)
    return two_branches(dit, t)


def with_image(dit):
    x, texts = inputs(batch=1)
    image = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(9))
    return dit(x, torch.tensor([500.0]), texts[0], image)


def few_tokens(dit):
    """3 tokens of a frame: of 4 ranks one has none."""
    return torch.cat([two_branches(dit, grid=(2, 1, 3), batch=1), two_branches(dit, grid=(1, 1, 3), batch=1)], dim=3)


def with_image_branch(**changes):
    return random_dit(image_dim=10, added_kv_proj_dim=HEADS * HEAD_DIM, **changes)


SCENES = {
    "both branches": (random_dit, two_branches),
    "one batch": (random_dit, one_batch),
    "frames": (random_dit, per_frame),
    "tokens": (random_dit, per_token),
    "image": (with_image_branch, with_image),
    "no cross norm": (lambda: random_dit(cross_attn_norm=False), two_branches),
    "few tokens": (random_dit, few_tokens),
    "fast, both branches": (lambda: fast(random_dit()), two_branches),
    "fast, one batch": (lambda: fast(random_dit()), one_batch),
    "fast, frames": (lambda: fast(random_dit()), per_frame),
    "fast, tokens": (lambda: fast(random_dit()), per_token),
    "fast, image": (lambda: fast(with_image_branch()), with_image),
    "fast, few tokens": (lambda: fast(random_dit()), few_tokens),
}


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@torch.inference_mode()
def all_scenes(world, ring, ulysses):
    """Of every scene: the error against one rank, and the bits."""
    found = {}
    for name, (make, run) in SCENES.items():
        dit = make()
        expected = run(dit)
        sequence(world, ring, ulysses).install(dit)
        result = run(dit)
        found[name] = relative_error(result, expected), digest(result)
    return found


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    native("dit")  # else every rank would, at the same time


@pytest.mark.parametrize(("ring", "ulysses"), PRODUCTS)
def test_every_rank_has_the_velocity_of_one(ring: int, ulysses: int) -> None:
    first, *others = run_ranks(ring * ulysses, all_scenes, ring, ulysses)
    assert {name: error for name, (error, _) in first.items() if not error <= ROUNDING_FP32} == {}
    assert all(other == first for other in others)


@torch.inference_mode()
def hidden_and_not(world, ring, ulysses):
    """Whether the bits are the same where heads are sent while others are attended to; and the bytes of both ways."""
    found = []
    for worth_hiding_bytes in (0, 1 << 40):
        dit = random_dit()
        sequence(world, ring, ulysses, worth_hiding_bytes=worth_hiding_bytes).install(dit)
        before = world.sent_bytes
        found.append((digest(two_branches(dit)), world.sent_bytes - before))
    return found


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 2)])
def test_sending_behind_the_computation_changes_nothing(ring: int, ulysses: int) -> None:
    for hidden, plain in run_ranks(ring * ulysses, hidden_and_not, ring, ulysses):
        assert hidden == plain


@torch.inference_mode()
def bfloat16_errors(world, ring, ulysses):
    """Relative errors over three networks against float32: of one rank, and of several."""
    alone, divided = [], []
    for seed in range(3):
        exact = two_branches(random_dit(seed))
        dit = in_bfloat16(random_dit(seed))
        alone.append(relative_error(two_branches(dit), exact))
        sequence(world, ring, ulysses).install(dit)
        divided.append(relative_error(two_branches(dit), exact))
    return sum(alone), sum(divided)


@pytest.mark.parametrize(("ring", "ulysses"), PRODUCTS)
def test_in_bfloat16_several_ranks_are_as_accurate_as_one(ring: int, ulysses: int) -> None:
    for alone, divided in run_ranks(ring * ulysses, bfloat16_errors, ring, ulysses):
        assert 3e-3 < alone < 0.3  # a real bfloat16 run, and not noise
        assert divided <= BF16_SLACK * alone


@torch.inference_mode()
def sent_by_attention(world, ring, ulysses):
    """Bytes that this rank sent in one pass, and those it sent for the gathered cells alone."""
    dit, ways = random_dit(), sequence(world, ring, ulysses)
    ways.install(dit)
    before = world.sent_bytes
    with_attention = two_branches(dit)
    both = world.sent_bytes - before
    before = world.sent_bytes
    for velocity in with_attention:
        ways._gathered(my_cells(velocity, ways), divide_frames(GRID, ring=ring, ulysses=ulysses))
    return both, world.sent_bytes - before


def my_cells(velocity, ways):
    shares = divide_frames(GRID, ring=ways.ring.size, ulysses=ways.ulysses.size)
    span = shares.span(ways.ring.index, ways.ulysses.index)
    return torch.zeros(velocity.shape[0], GRID[0] * (span.stop - span.start), 16)


@pytest.mark.parametrize(("ring", "ulysses"), PRODUCTS)
def test_what_is_sent_is_what_theory_says(ring: int, ulysses: int) -> None:
    batch, calls = 2, 1 + 2 * (LAYERS - 1)  # the first self-attention is shared by the branches
    shares = divide_frames(GRID, ring=ring, ulysses=ulysses)
    heads = [len(part) for part in torch.arange(HEADS).tensor_split(ulysses)]
    number = batch * HEAD_DIM * 4 * GRID[0]  # bytes of a token of each frame and head
    for rank, (sent, for_cells) in enumerate(run_ranks(ring * ulysses, sent_by_attention, ring, ulysses)):
        r, u = divmod(rank, ulysses)
        mine, place = shares.widths[r][u], shares.of_places[r]
        to_heads = 3 * mine * (HEADS - heads[u])
        back = (place - mine) * heads[u]
        passed_on = sum(shares.of_places) - shares.of_places[(r + 1) % ring]  # all but the block that came last
        around = 2 * heads[u] * passed_on if ring > 1 else 0
        cells = 2 * batch * 4 * GRID[0] * 16 * ((ulysses - 1) * mine + (ring - 1) * place)
        assert for_cells == cells
        assert sent - for_cells == calls * number * (to_heads + back + around)


def formula(q, k, v):
    logits = torch.einsum("blhk,bshk->bhls", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhls,bshk->blhk", logits.softmax(-1), v.double())


def ring_alone(world, lengths, forgotten):
    """Error of a ring over tokens of these lengths, where each rank forgets so many of its keys."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, sum(lengths), 3, 16, generator=generator) for _ in range(3))
    mine = [x.split(lengths, dim=1)[world.rank] for x in (q, k, v)]
    kept = [length - dropped for length, dropped in zip(lengths, forgotten, strict=True)]
    keys, values = (x[:, : kept[world.rank]] for x in mine[1:])
    out = attend_around(mine[0], keys, values, team=world.everyone, lengths=kept)
    expected = formula(q, k, v).split(lengths, dim=1)[world.rank]
    return out.isfinite().all().item(), relative_error(out, expected) if out.numel() else 0.0


@pytest.mark.parametrize("lengths", [(4, 4, 4), (7, 1, 3), (0, 5, 2), (0, 9, 0)])
def test_a_ring_attends_to_all_keys_of_uneven_blocks(lengths: tuple[int, ...]) -> None:
    for finite, error in run_ranks(3, ring_alone, lengths, (0, 0, 0)):
        assert finite
        assert error <= ROUNDING_FP32


def test_a_key_that_one_rank_forgets_is_noticed_by_all() -> None:
    for _, error in run_ranks(3, ring_alone, (7, 1, 3), (0, 1, 0)):
        assert error > 1e-2


def heads_alone(world, lengths, num_heads, pieces):
    """Error where every rank attends for some heads, in pieces; and the bytes that this rank sent."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, sum(lengths), num_heads, 16, generator=generator) for _ in range(3))
    mine = [x.split(lengths, dim=1)[world.rank] for x in (q, k, v)]
    before = world.sent_bytes
    out = attend_by_heads(sdpa, mine, team=world.everyone, lengths=lengths, pieces=pieces)
    expected = formula(q, k, v).split(lengths, dim=1)[world.rank]
    assert out.shape == mine[0].shape
    return relative_error(out, expected) if out.numel() else 0.0, world.sent_bytes - before


@pytest.mark.parametrize("num_heads", [3, 7])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (0, 5, 2)])
def test_heads_that_are_sent_in_pieces_come_back_in_order(lengths: tuple[int, ...], num_heads: int) -> None:
    whole = run_ranks(3, heads_alone, lengths, num_heads, 1)
    assert max(error for error, _ in whole) <= ROUNDING_FP32
    for pieces in (2, 3):
        assert run_ranks(3, heads_alone, lengths, num_heads, pieces) == whole


@torch.inference_mode()
def out_of_order(world, by_ulysses):
    """The second rank takes itself for the first, in both ways alike."""
    group, order = world.everyone.group, (0, 1) if world.rank == 0 else (1, 0)
    team = Team(order, world.rank, group)
    dit = random_dit()
    grid = (3, 4, 7)  # even shares: else the sizes would not fit
    expected = two_branches(dit, grid=grid)
    ways = {"ulysses": team, "ring": ALONE} if by_ulysses else {"ulysses": ALONE, "ring": team}
    SequenceParallel(**ways).install(dit)
    return relative_error(two_branches(dit, grid=grid), expected)


def test_ranks_that_disagree_on_their_order_are_noticed() -> None:
    assert min(run_ranks(2, out_of_order, False)) > 1e-2


@torch.inference_mode()
def test_a_team_of_one_computes_the_same_bits() -> None:
    for make, run in (SCENES["both branches"], SCENES["fast, tokens"]):
        dit = make()
        expected = run(dit)
        SequenceParallel(ulysses=ALONE, ring=ALONE).install(dit)
        assert torch.equal(run(dit), expected)


@pytest.mark.parametrize(("ring", "ulysses"), [*PRODUCTS, (3, 5), (40, 1)])
def test_every_token_of_a_frame_is_in_one_share(ring: int, ulysses: int) -> None:
    shares = divide_frames(GRID, ring=ring, ulysses=ulysses)
    tokens = [i for r in range(ring) for u in range(ulysses) for i in range(35)[shares.span(r, u)]]
    assert tokens == list(range(35))
    widths = [width for place in shares.widths for width in place]
    assert max(widths) - min(widths) <= 1


def test_more_ranks_than_heads_are_refused() -> None:
    with pytest.raises(
        RequestError, match=r"ulysses=6 is more than the 5 heads .* use ulysses=5 or less, and the ring"
    ):
        SequenceParallel(ulysses=Team(range(6), 0, None), ring=ALONE).install(random_dit())
    check_heads(5, 5)


def test_a_self_attention_that_is_not_there_is_noticed() -> None:
    dit = random_dit()
    dit.spec = dataclasses.replace(dit.spec, num_layers=LAYERS + 1)
    with pytest.raises(InternalError, match="2 self-attentions were divided, of 3 layers"):
        SequenceParallel(ulysses=ALONE, ring=ALONE).install(dit)


def test_attention_outside_of_its_network_is_refused() -> None:
    dit = random_dit()
    SequenceParallel(ulysses=ALONE, ring=ALONE).install(dit)
    q = torch.zeros(1, 3, HEADS, HEAD_DIM)
    with pytest.raises(InternalError, match="outside of its network"):
        dit.block_list[0].attn1.attend(q, q, q)
    assert dit.block_list[0].attn2.attend is sdpa


def without_memory(*_):
    raise torch.OutOfMemoryError("no room for 3 GiB\nand so on")


@torch.inference_mode()
def test_memory_that_runs_out_ends_the_run_of_all_ranks() -> None:
    """As an error that no part of the program answers by computing otherwise: the other ranks would wait for ever."""
    dit = random_dit()
    SequenceParallel(ulysses=ALONE, ring=ALONE).install(dit)
    dit.run_blocks = without_memory
    with pytest.raises(RequestError, match=r"rank 0 ran out of memory .*\(no room for 3 GiB\); use more ranks"):
        two_branches(dit)
    assert dit.ops == Ops()
