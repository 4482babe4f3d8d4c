"""The engine: ZeRO 0-3 and any split over ranks are one optimiser; its state moves between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from emoverse.engine import distributed
from emoverse.engine.deepspeed_engine import Engine, deepspeed_config
from emoverse.engine.distributed import World
from emoverse.engine.optim import build_optimizer, lr_factor, parameter_groups
from emoverse.engine.step_types import BadNumbers, TrainedState, check_finite

OPTIM = SimpleNamespace(
    lr_lora=1e-2, lr_projector=5e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8
)
STEPS, GLOBAL_BATCH = 4, 6
Ranks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Pack:
    """`inputs` [samples, 4], one weight per sample, `task` per sample."""

    inputs: Tensor
    weights: Tensor
    task: Tensor

    def to(self, device: torch.device) -> "Pack":
        return self


class ToyOutput(NamedTuple):
    """The fields of `StepOutput`."""

    loss_sum: Tensor
    task_loss: Tensor
    task_weight: Tensor
    task_tokens: Tensor


class Toy(nn.Module):
    """Frozen base, a low-rank pair and a projector with a bias; odd sizes need padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.base = nn.Linear(4, 5).requires_grad_(False)
        self.down = nn.Linear(5, 3, bias=False)
        self.up = nn.Linear(3, 7, bias=False)
        self.projector = nn.Linear(7, 3)

    def forward(self, pack: Pack) -> ToyOutput:
        inputs = pack.inputs.to(self.base.weight.dtype)
        logits = self.projector(torch.tanh(self.up(self.down(self.base(inputs))))).float()
        losses = nn.functional.cross_entropy(logits, pack.task % 3, reduction="none") * pack.weights
        zeros = torch.zeros(5)
        return ToyOutput(
            loss_sum=losses.sum(),
            task_loss=zeros.index_add(0, pack.task, losses.detach()),
            task_weight=zeros.index_add(0, pack.task, pack.weights),
            task_tokens=zeros.index_add(0, pack.task, (pack.weights > 0).float()),
        )

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        projector = [item for item in named if item[0].startswith("projector")]
        return {"lora": [item for item in named if item not in projector], "projector": projector}


def share(step: int, world: World, pack_size: int) -> list[Pack]:
    """This rank's packs: rank 0 of 2 takes four of six samples, so ranks differ in pack count."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(GLOBAL_BATCH, 4, generator=generator)
    weights = torch.rand(GLOBAL_BATCH, generator=generator) + 0.5
    task = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)
    cut = [slice(0, 6)] if world.world_size == 1 else [slice(0, 4), slice(4, 6)]
    mine = cut[world.rank]
    chunks = zip(*(t[mine].split(pack_size) for t in (inputs, weights, task)), strict=True)
    return [Pack(*chunk) for chunk in chunks]


# ZeRO stages, and those that keep something in the host's memory.
OFFLOADS = {"2 optimizer": (2, "optimizer"), "3 optimizer": (3, "optimizer"), "3 all": (3, "all")}
ENGINES = (0, 1, 2, 3, *OFFLOADS)


def build(world: World, kind: int | str, *, precision: str = "fp32", clip: float = 0.05) -> Engine:
    model = Toy()
    optimizer = build_optimizer(parameter_groups(model.groups(), OPTIM), OPTIM)
    stage, offload = OFFLOADS.get(str(kind), (kind, "off"))
    settings = deepspeed_config(
        zero_stage=int(stage),
        offload=offload,
        precision=precision,
        clip=clip,
        world_size=world.world_size,
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    return Engine(model, optimizer, world, settings)


def empty() -> Pack:
    return Pack(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def train(engine: Engine, world: World, first: int, last: int, pack_size: int) -> list[Any]:
    rows = []
    for step in range(first, last):
        packs = share(step, world, pack_size)
        consensus = distributed.agree_on_step(
            world,
            num_packs=len(packs),
            normaliser=float(sum(len(p.inputs) for p in packs)),
            stop=False,
            error=None,
            doing="test",
        )
        result = engine.step(
            packs,
            num_packs=consensus.num_packs,
            normaliser=consensus.normaliser,
            lr_factor=lr_factor(step, num_steps=STEPS, warmup=2, min_ratio=0.1),
            make_empty=empty,
        )
        rows.append((result.loss, result.grad_norm, sum(result.task_tokens)))
    return rows


def whole_run(stage: int | str, pack_size: int, precision: str = "fp32") -> Callable[[World], Any]:
    def work(world: World) -> Any:
        engine = build(world, stage, precision=precision)
        rows = train(engine, world, 0, STEPS, pack_size)
        return rows, engine.export_state()

    return work


def plain_run() -> tuple[list[float], dict[str, Tensor]]:
    """The same training by hand: one process, one pack, torch only."""
    model, world = Toy(), World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    optimizer = build_optimizer(parameter_groups(model.groups(), OPTIM), OPTIM)
    losses = []
    for step in range(STEPS):
        factor = lr_factor(step, num_steps=STEPS, warmup=2, min_ratio=0.1)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        loss = model(share(step, world, 6)[0]).loss_sum / GLOBAL_BATCH
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
        optimizer.step()
        losses.append(loss.item())
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.promise(2)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", ENGINES)
def test_every_zero_stage_is_plain_adamw(
    run_ranks: Ranks, stage: int | str, world_size: int
) -> None:
    losses, params = plain_run()
    results = run_ranks(whole_run(stage, pack_size=2), world_size)
    for rows, _ in results:
        assert [row[0] for row in rows] == pytest.approx(losses, rel=1e-5)
        assert all(math.isfinite(norm) and norm > 0.05 for _, norm, _ in rows)  # clipping is active
        assert all(tokens == GLOBAL_BATCH for _, _, tokens in rows)
    state: TrainedState = results[0][1]
    assert state.updates == STEPS
    assert state.params.keys() == params.keys() == state.exp_avg.keys() == state.exp_avg_sq.keys()
    for name, value in params.items():
        torch.testing.assert_close(state.params[name], value, rtol=1e-5, atol=1e-6)
    assert all(not other[1].params for other in results[1:])


def test_gradient_norms_agree_between_stages(run_ranks: Ranks) -> None:
    runs = [run_ranks(whole_run(stage, pack_size=4), 2)[0][0] for stage in ENGINES]
    for rows in runs[1:]:
        assert rows == [pytest.approx(row, rel=1e-5) for row in runs[0]]


def resumed(stage: int | str, state: TrainedState) -> Callable[[World], Any]:
    def work(world: World) -> Any:
        engine = build(world, stage)
        engine.import_state(state)
        rows = train(engine, world, 2, STEPS, 2)
        return rows, engine.export_state()

    return work


def half_run(stage: int | str) -> Callable[[World], Any]:
    def work(world: World) -> Any:
        engine = build(world, stage)
        train(engine, world, 0, 2, 2)
        return engine.export_state()

    return work


@pytest.mark.promise(2)
@pytest.mark.parametrize("stage", ENGINES)
def test_resume_is_bit_identical(run_ranks: Ranks, stage: int | str) -> None:
    rows, end = run_ranks(whole_run(stage, pack_size=2), 2)[0]
    state = run_ranks(half_run(stage), 2)[0]
    again, end_again = run_ranks(resumed(stage, state), 2)[0]
    assert again == rows[2:]
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        for name, value in getattr(end, kind).items():
            assert torch.equal(getattr(end_again, kind)[name], value), (kind, name)


@pytest.mark.promise(2)
@pytest.mark.parametrize(
    ("saved", "loaded", "ranks"),
    [(2, 3, 1), (3, 0, 2), (0, 2, 1), (1, 3, 2), ("3 all", 2, 1), (2, "3 all", 2)],
)
def test_state_moves_to_another_stage_and_world(
    run_ranks: Ranks, saved: int | str, loaded: int | str, ranks: int
) -> None:
    rows, _ = run_ranks(whole_run(saved, pack_size=2), 2)[0]
    state = run_ranks(half_run(saved), 2)[0]
    again, _ = run_ranks(resumed(loaded, state), ranks)[0]
    assert [row[0] for row in again] == pytest.approx([row[0] for row in rows[2:]], rel=1e-5)


@pytest.mark.parametrize("stage", ENGINES[1:])
def test_bf16_keeps_fp32_masters_and_resumes(run_ranks: Ranks, stage: int | str) -> None:
    losses, _ = plain_run()

    def work(world: World) -> Any:
        engine = build(world, stage, precision="bf16")
        head = train(engine, world, 0, 2, 2)
        return head, engine.export_state()

    def rest(state: TrainedState) -> Callable[[World], Any]:
        def resume(world: World) -> Any:
            engine = build(world, stage, precision="bf16")
            engine.import_state(state)
            return train(engine, world, 2, STEPS, 2)

        return resume

    whole = run_ranks(whole_run(stage, pack_size=2, precision="bf16"), 2)[0][0]
    head, state = run_ranks(work, 2)[0]
    assert [row[0] for row in whole] == pytest.approx(losses, rel=0.02)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in state.params.values())
    assert head + run_ranks(rest(state), 2)[0] == whole


def test_bf16_without_sharding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.zero_stage: with bf16 .* set it to 1, 2 or 3"):
        deepspeed_config(zero_stage=0, precision="bf16", clip=1.0, world_size=1, num_trainable=10)


def test_offloading_needs_a_stage_that_divides_it() -> None:
    for stage, offload, rule in ((1, "optimizer", "set it to 2 or 3"), (2, "all", "set it to 3")):
        with pytest.raises(
            ValueError, match=rf"train\.offload: .*train\.zero_stage is {stage}.*{rule}"
        ):
            deepspeed_config(
                zero_stage=stage,
                precision="fp32",
                clip=1.0,
                world_size=1,
                num_trainable=10,
                offload=offload,
            )


QUICK = {(0, "fp32", "spike"), (1, "fp32", "loss"), (3, "fp32", "gradient"), (2, "bf16", "loss")}
QUICK |= {("2 optimizer", "bf16", "spike"), ("3 all", "fp32", "gradient")}


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("stage", "precision", "poison"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for poison in ("loss", "gradient", "spike")
        for case in [
            *((kind, "fp32", poison) for kind in ENGINES),
            *((kind, "bf16", poison) for kind in (2, "2 optimizer", "3 all")),
        ]
    ],
)
def test_a_bad_step_leaves_no_trace(
    run_ranks: Ranks, stage: int | str, precision: str, poison: str
) -> None:
    """On one rank of two: all raise, and training goes on as if the step had not been."""

    def check(loss: float, norm: float) -> str | None:
        return "spike: the loss is a spike" if poison == "spike" else check_finite(loss, norm)

    def work(world: World) -> Any:
        engine = build(world, stage, precision=precision)
        train(engine, world, 0, 1, 2)
        before = engine.export_state()
        packs = share(1, world, 2)
        if world.rank == 1 and poison == "loss":
            packs[0] = replace(packs[0], weights=packs[0].weights * float("nan"))
        handle = engine._named["up.weight"].register_hook(
            lambda grad: grad * (float("inf") if poison == "gradient" and world.rank == 1 else 1)
        )
        with pytest.raises(BadNumbers, match=f"{poison}.* is (not finite|a spike)") as bad:
            step = {"num_packs": 2, "normaliser": 6.0, "lr_factor": 1.0, "make_empty": empty}
            engine.step(packs, check=check, **step)
        handle.remove()
        after = engine.export_state()
        rows = train(engine, world, 1, STEPS, 2)
        return before, after, rows, engine.export_state(), bad.value.rank_loss

    def undisturbed(world: World) -> Any:
        engine = build(world, stage, precision=precision)
        return train(engine, world, 0, STEPS, 2)[1:], engine.export_state()

    before, after, rows, end, rank_loss = run_ranks(work, 2)[0]
    good_rows, good_end = run_ranks(undisturbed, 2)[0]
    assert [math.isfinite(loss) for loss in rank_loss] == [True, poison != "loss"]
    assert rows == good_rows
    for first, second in ((before, after), (end, good_end)):
        assert first.updates == second.updates
        for kind in ("params", "exp_avg", "exp_avg_sq"):
            for name, value in getattr(first, kind).items():
                assert torch.equal(getattr(second, kind)[name], value), (kind, name)


def test_weights_that_do_not_fit_are_refused(run_ranks: Ranks) -> None:
    def work(world: World) -> Any:
        engine = build(world, 2)
        wrong = {name: torch.zeros(shape) for name, shape in engine.shapes.items()}
        del wrong["down.weight"]
        with pytest.raises(ValueError, match=r"missing \['down\.weight'\] \(1\).*keep model"):
            engine.import_params(wrong)
        return True

    assert run_ranks(work, 1) == [True]
