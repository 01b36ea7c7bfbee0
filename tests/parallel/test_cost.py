"""The cost model: the bytes that it names are those that real ranks count, and its operations those of the networks."""

import itertools

import pytest
import torch
from ranks import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from frameloom.errors import RequestError
from frameloom.models.meta import on_meta
from frameloom.models.spec import TransformerSpec, VaceSpec, VaeSpec
from frameloom.models.vace import VaceDiT, make_dit, under_empty_control
from frameloom.models.vae_fast import REFERENCE, without_weights
from frameloom.models.wan_dit import Control, WanDiT
from frameloom.models.wan_vae import WanVAE
from frameloom.parallel import tensor
from frameloom.parallel.cost import Exchange, Link, Network, RankCost, predicted_s
from frameloom.parallel.guidance import one_branch_each
from frameloom.parallel.mesh import Mesh
from frameloom.parallel.pass_cost import VaeWork, margin_costs, pass_costs, prefers_margin
from frameloom.parallel.sequence import SequenceParallel
from frameloom.parallel.share import Share
from frameloom.parallel.step_cost import StepWork, step_costs
from frameloom.parallel.vae_margin import margin_cells
from frameloom.parallel.vae_passage import SharedPassage
from frameloom.pipeline import stages
from frameloom.pipeline.vace import VaceConditions
from frameloom.types import ParallelPlan

SMALL = {
    "num_attention_heads": 6,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 3,
}
VACE = {**SMALL, "vace_layers": (0, 2), "vace_in_channels": 5}
LATENT = (3, 10, 14)  # 35 tokens of a frame: they divide by none of the ranks
PLANS = [
    ParallelPlan(ulysses=2),
    ParallelPlan(ulysses=4),
    ParallelPlan(ring=2),
    ParallelPlan(ring=3),
    ParallelPlan(ring=2, ulysses=2),
    ParallelPlan(cfg=2),
    ParallelPlan(cfg=2, ulysses=2),
    ParallelPlan(cfg=2, ring=2),
    ParallelPlan(tp=2),
    ParallelPlan(tp=3),
    ParallelPlan(tp=2, ulysses=2),
    ParallelPlan(cfg=2, tp=2),
]
BRANCHES = {"shared": {}, "batched": {"batched": True}, "one": {"branches": 1}}


def spec_of(kind: str) -> TransformerSpec:
    return VaceSpec(**VACE) if kind == "vace" else TransformerSpec(**SMALL)


def step_work(kind: str, branches: str, dtype: torch.dtype) -> StepWork:
    return StepWork(spec=spec_of(kind), latent_THW=LATENT, batch=2, itemsize=dtype.itemsize, **BRANCHES[branches])


@torch.inference_mode()
def sent_in_steps(world, plan: ParallelPlan, latent: tuple[int, int, int], kind: str = "plain") -> dict[str, int]:
    """Bytes that this rank sent in a step, of every way to compute the branches."""
    mesh, found = Mesh.of(world, plan), {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        dit = make_dit(spec_of(kind)).eval()
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if dit.keep_in_fp32(name) else dtype)
        tensor.divide(dit, mesh.tp)
        tensor.join(dit, mesh.tp)
        SequenceParallel(ulysses=mesh.ulysses, ring=mesh.ring).install(dit)
        for name in BRANCHES:
            found[f"{name} {dtype}"] = _sent_in_step(world, mesh, dit, name, latent)
    return found


def _sent_in_step(world, mesh: Mesh, dit: WanDiT, branches: str, latent: tuple[int, int, int]) -> int:
    x, t = torch.randn(2, 4, *latent), torch.tensor([500.0, 500.0])
    texts = [torch.randn(2, 20, 12) for _ in range(1 if branches == "one" else 2)]
    choices = stages.LoopChoices(prompt_once=True, shared_branches=True, guidance_batched=branches == "batched")
    make = stages.Predictor if mesh.cfg.size == 1 else one_branch_each(stages.Predictor, mesh.cfg)
    if isinstance(dit, VaceDiT):
        control = Control(torch.randn(1, 5, *latent), (1.0, 0.5))
        make = VaceConditions(control=control, num_references=0).predictor(make)
    predict = make(texts, choices)
    predict(dit, x, t)  # which reads the prompt
    before = world.sent_bytes
    predict(dit, x, t)
    return world.sent_bytes - before


OF_VACE = [("vace", plan) for plan in PLANS if plan.num_ranks == 2]


@pytest.mark.parametrize(("kind", "plan"), [*(("plain", plan) for plan in PLANS), *OF_VACE], ids=str)
def test_what_a_step_sends_is_what_is_counted(kind: str, plan: ParallelPlan) -> None:
    counted = run_ranks(plan.num_ranks, sent_in_steps, plan, LATENT, kind)
    for branches, dtype in itertools.product(BRANCHES, (torch.float32, torch.bfloat16)):
        expected = [cost.sent_bytes for cost in step_costs(step_work(kind, branches, dtype), plan)]
        assert [found[f"{branches} {dtype}"] for found in counted] == expected, (branches, dtype)


def test_a_rank_without_tokens_sends_what_is_counted() -> None:
    plan, latent = ParallelPlan(ring=2, ulysses=2), (2, 2, 6)  # 3 tokens of a frame
    work = StepWork(spec=TransformerSpec(**SMALL), latent_THW=latent, batch=2, itemsize=4)
    counted = run_ranks(4, sent_in_steps, plan, latent)
    assert [found["shared torch.float32"] for found in counted] == [c.sent_bytes for c in step_costs(work, plan)]


VAES = {
    "2.1": {"base_dim": 4, "z_dim": 4, "dim_mult": (1, 2, 2, 2), "num_res_blocks": 1},
    "2.2": {
        "base_dim": 4,
        "decoder_base_dim": 8,
        "z_dim": 6,
        "dim_mult": (1, 2, 2, 2),
        "num_res_blocks": 1,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
    },
}
CELLS = [(9, 5), (7, 4), (2, 3), (8, 8)]  # of latents: heights that divide by none, and fewer rows than ranks


def vae_spec(kind: str) -> VaeSpec:
    z_dim = VAES[kind]["z_dim"]
    return VaeSpec(**VAES[kind], latents_mean=(0.0,) * z_dim, latents_std=(1.0,) * z_dim)


def vae_work(kind: str, cells: tuple[int, int], dtype: torch.dtype, **options) -> VaeWork:
    return VaeWork(spec=vae_spec(kind), latent_THW=(4, *cells), steps=2, itemsize=dtype.itemsize, **options)


@torch.inference_mode()
def sent_by_vae(world, kind: str, dtype: torch.dtype, columns: int | None) -> list[tuple[int, int]]:
    """Bytes that this rank sent to decode and to encode each picture."""
    vae, found = WanVAE(vae_spec(kind)).eval().to(dtype), []
    for height, width in CELLS:
        share = Share.of(world.everyone, height, width, columns=columns)
        z = torch.randn(1, vae.spec.z_dim, 4, height, width)
        x = torch.zeros(13, height * vae.spec.spatial_scale, width * vae.spec.spatial_scale, 3, dtype=torch.uint8)
        counts = [world.sent_bytes]
        for _ in stages.decode(vae, z, iter([SharedPassage(steps=2, share=share)]), len_of_nothing):
            pass
        counts.append(world.sent_bytes)
        stages.encode(vae, x, iter([SharedPassage(steps=2, share=share, encodes=True)]))
        counts.append(world.sent_bytes)
        found.append((counts[1] - counts[0], counts[2] - counts[1]))
    return found


@torch.inference_mode()
def sent_with_margins(world, kind: str, cells: tuple[int, int]) -> tuple[int, int]:
    """Bytes that this rank sent to decode and to encode where nothing is fetched."""
    vae, (height, width) = WanVAE(vae_spec(kind)).eval(), cells
    share = Share.of(world.everyone, height, width)
    ways = [
        SharedPassage(steps=2, share=share, margin=margin_cells(vae.spec, encodes=e), encodes=e) for e in (False, True)
    ]
    x = torch.zeros(13, height * vae.spec.spatial_scale, width * vae.spec.spatial_scale, 3, dtype=torch.uint8)
    counts = [world.sent_bytes]
    for _ in stages.decode(vae, torch.randn(1, vae.spec.z_dim, 4, height, width), iter(ways[:1]), len_of_nothing):
        pass
    counts.append(world.sent_bytes)
    stages.encode(vae, x, iter(ways[1:]))
    return counts[1] - counts[0], world.sent_bytes - counts[1]


@pytest.mark.parametrize("cells", [(9, 5), (2, 1)])
@pytest.mark.parametrize("kind", VAES)
def test_what_is_sent_with_margins_is_what_is_counted(kind: str, cells: tuple[int, int]) -> None:
    works = [vae_work(kind, cells, torch.float32, encodes=encodes) for encodes in (False, True)]
    costs = zip(*(margin_costs(work, 3) for work in works), strict=True)
    expected = [(decoding.sent_bytes, encoding.sent_bytes) for decoding, encoding in costs]
    assert run_ranks(3, sent_with_margins, kind, cells) == expected


def len_of_nothing(_: int) -> None:
    """Nobody is told of progress."""


DIVIDED = [(2, 1, torch.float32), (3, 1, torch.float32), (4, 1, torch.float32), (2, 2, torch.float32)]
DIVIDED += [(4, 2, torch.float32), (3, None, torch.float32), (2, 1, torch.bfloat16)]


@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize(("count", "columns", "dtype"), DIVIDED)
def test_what_a_pass_sends_is_what_is_counted(count: int, columns: int | None, dtype: torch.dtype, kind: str) -> None:
    counted = run_ranks(count, sent_by_vae, kind, dtype, columns)
    for index, cells in enumerate(CELLS):
        for way, encodes in enumerate((False, True)):
            costs = pass_costs(vae_work(kind, cells, dtype, encodes=encodes, columns=columns), count)
            assert [found[index][way] for found in counted] == [cost.sent_bytes for cost in costs], (cells, encodes)


@pytest.mark.parametrize("kind", VAES)
def test_two_rows_per_convolution_and_none_at_the_outer_sides(kind: str) -> None:
    """By hand, from the network's own convolutions: every rank has 2 of 8 rows of latents, 3 columns, 1 frame."""
    work = VaeWork(spec=vae_spec(kind), latent_THW=(1, 8, 3), itemsize=4)
    counted = sum(
        conv.in_channels * 3 * 4 * scale
        for conv, scale in _convolutions(without_weights(work.spec, torch.float32, REFERENCE))
    )
    halos = [
        {
            rank: sum(e.sends.get(rank, 0) for e in cost.exchanges if e.kind == "halo")
            for e in cost.exchanges
            for rank in e.sends
            if e.kind == "halo"
        }
        for cost in pass_costs(work, 4)
    ]
    row = dict.fromkeys(range(4), counted)
    assert halos == [{i: row[i] for i in (rank - 1, rank + 1) if 0 <= i < 4} for rank in range(4)]


def _convolutions(vae: WanVAE):
    """Those of three rows in the decoder, and the pixels per latent cell of what they read."""
    scale = 1
    for name, module in vae.decoder.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and module.kernel_size[-2] == 3:
            scale *= 2 if ".resample." in name else 1
            yield module, scale


def test_a_halving_convolution_sends_one_row_upwards() -> None:
    costs = pass_costs(vae_work("2.1", (8, 3), torch.float32, encodes=True), 2)
    up = sum(e.sends.get(0, 0) for e in costs[1].exchanges if e.kind == "halo")
    down = sum(e.sends.get(1, 0) for e in costs[0].exchanges if e.kind == "halo")
    halving = sum(channels * frames * 3 * scale * 4 for channels, frames, scale in ((4, 13, 8), (8, 13, 4), (8, 7, 2)))
    assert up - down == halving


SIZES = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 3}


@pytest.mark.parametrize(
    "spec", [TransformerSpec(**SIZES), VaceSpec(**SIZES, vace_layers=(0, 1))], ids=["plain", "vace"]
)
def test_operations_of_a_step_are_those_of_the_network(spec: TransformerSpec) -> None:
    with on_meta():
        dit = make_dit(spec).eval()
    x, t, text = (torch.empty(*shape, device="meta") for shape in ((1, 16, 5, 30, 52), (1,), (1, 512, 4096)))
    with torch.inference_mode():
        prompts = [under_empty_control(dit.read_prompt(text), dit, x)] * 2
        with FlopCounterMode(display=False) as counter:
            dit.velocities(x, t, prompts)
    work = StepWork(spec=spec, latent_THW=(5, 30, 52))
    (cost,) = step_costs(work, ParallelPlan())
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.005)
    for plan in (ParallelPlan(cfg=2, ulysses=3), ParallelPlan(tp=4), ParallelPlan(ring=2, ulysses=3)):
        total = sum(cost.flops for cost in step_costs(work, plan))
        assert total == pytest.approx(cost.flops * (12 / 10 if plan.cfg == 2 else 1), rel=0.2)


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("kind", VAES)
def test_operations_of_a_pass_are_those_of_the_network(kind: str, encodes: bool) -> None:
    twin = without_weights(vae_spec(kind), torch.float32, REFERENCE)
    work = vae_work(kind, (6, 8), torch.float32, encodes=encodes)
    scale = twin.spec.spatial_scale
    shape = (1, 3, 13, 6 * scale, 8 * scale) if encodes else (1, twin.spec.z_dim, 4, 6, 8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        (twin.encode if encodes else twin.decode)(torch.empty(shape, device="meta"))
    (cost,) = pass_costs(work, 1)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert sum(part.flops for part in pass_costs(work, 3)) == pytest.approx(cost.flops)
    assert sum(part.flops for part in margin_costs(work, 3)) > 2 * cost.flops


def test_seconds_are_those_of_the_busiest_end() -> None:
    def cost(sends: dict[int, int], behind: float = 0) -> RankCost:
        return RankCost(flops=1e9, exchanges=(Exchange(kind="x", sends=sends, rounds=3, behind_flops=behind),))

    network = Network(inside=Link(bytes_per_s=100, latency_s=1))
    assert predicted_s([cost({1: 200}), cost({})], 1e9, network) == pytest.approx(1 + 2 + 3)
    to_one = [cost({}), cost({0: 200}), cost({0: 300})]
    assert predicted_s(to_one, 1e9, network) == pytest.approx(1 + 5 + 3)
    assert predicted_s([cost({1: 200}, 4e9), cost({}, 9e9)], 1e9, network) == pytest.approx(1 + 5 - 4)
    assert predicted_s([cost({}, 4e9)], 1e9, network) == pytest.approx(1)


def test_ranks_of_a_machine_share_its_link_to_the_others() -> None:
    def cost(rank: int) -> RankCost:
        sends = {(rank + 2) % 4: 100, rank ^ 1: 100}
        return RankCost(flops=0, exchanges=(Exchange(kind="x", sends=sends, rounds=1),))

    network = Network(
        inside=Link(bytes_per_s=100, latency_s=0), between=Link(bytes_per_s=50, latency_s=1), per_machine=2
    )
    assert predicted_s([cost(rank) for rank in range(4)], 1.0, network) == pytest.approx(200 / 50 + 1)


def test_computing_a_margin_pays_where_the_link_is_slow() -> None:
    work = VaeWork(spec=VaeSpec(), latent_THW=(21, 60, 104), itemsize=2)
    fast, why = prefers_margin(work, 2, Link(bytes_per_s=300e9, latency_s=1e-5), 200e12)
    assert not fast
    assert "300 GB/s" in why
    assert prefers_margin(work, 2, Link(bytes_per_s=1e6, latency_s=1e-3), 200e12)[0]


def test_what_is_hidden_is_no_more_than_what_is_computed() -> None:
    work = StepWork(spec=TransformerSpec(), latent_THW=(21, 60, 104))
    for plan in (ParallelPlan(ring=8), ParallelPlan(ulysses=8)):
        for cost in step_costs(work, plan):
            assert 0 < sum(exchange.behind_flops for exchange in cost.exchanges) < cost.flops


def test_a_plan_that_divides_weights_at_rest_has_no_prediction() -> None:
    with pytest.raises(RequestError, match="no prediction for fsdp=2; leave fsdp out"):
        step_costs(StepWork(spec=TransformerSpec(**SMALL), latent_THW=LATENT), ParallelPlan(ulysses=2, fsdp=2))
