"""The DeepSpeed file: process group, ZeRO settings, one optimiser step, and the state to save.

In: a model whose call returns a `StepOutput`, packs of examples, the world.
Out: `Engine.step` -> `StepResult` (loss per task, gradient norm), `export_state`, `import_state` in
full tensors by parameter name, independent of the ZeRO stage and of the number of ranks.
No other file imports deepspeed; nothing here compiles an operator, so no compiler is needed.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes and logs that
import deepspeed
import deepspeed.ops
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from emoverse.config.deepspeed_settings import deepspeed_config
from emoverse.engine.distributed import World, gather_rows, shutdown
from emoverse.engine.optim import set_learning_rate
from emoverse.engine.step_types import (
    BadNumbers,
    Packs,
    Placeholders,
    StepResult,
    TrainedState,
    check_finite,
)
from emoverse.loss import gradient_scale, mean_loss

MOMENTS = ("exp_avg", "exp_avg_sq")


def start_process_group(world: World, *, timeout_s: float) -> None:
    """Joins the process group through DeepSpeed; a collective older than `timeout_s` fails."""
    if world.device.type == "cpu":
        # An empty table of operators: init_distributed then does not compile its shared-memory
        # collective, which only inference uses.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    else:
        torch.cuda.set_device(world.device)
    # Without all five variables DeepSpeed looks for MPI; libraries below it read LOCAL_RANK too.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    deepspeed.init_distributed(
        world.backend,
        auto_mpi_discovery=False,
        init_method=world.init_method,
        rank=world.rank,
        world_size=world.world_size,
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )


@contextlib.contextmanager
def process_group(world: World, *, timeout_s: float) -> Iterator[None]:
    """The process group while the block runs; it can be entered once per process.

    After an error it stays open: other ranks may wait in a collective, and only the end of this
    process tells them.
    """
    start_process_group(world, timeout_s=timeout_s)
    yield
    shutdown()


class Stopwatch:
    """Seconds that a device works in several blocks, without a synchronisation after each.

    Use `with watch:` around each block, then `watch.seconds()` after the last one. A GPU runs
    asynchronously, so its own events are the clock there.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._passed_s = 0.0
        self._begin_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._events.append((_cuda_event(), _cuda_event()))
            self._events[-1][0].record()
        else:
            self._begin_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._events[-1][1].record()
        else:
            self._passed_s += time.perf_counter() - self._begin_s

    def seconds(self) -> float:
        """Sum of all blocks; waits for the last one."""
        if self._events:
            self._events[-1][1].synchronize()
        on_gpu_ms = sum(float(begin.elapsed_time(end)) for begin, end in self._events)
        return self._passed_s + on_gpu_ms / 1000


def _cuda_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class _PackLoss(nn.Module):
    """Returns what DeepSpeed's hooks expect: a tuple of tensors, the loss first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pack: Any) -> tuple[Tensor, Tensor]:
        """Returns the scalar sum of w * ce, and float64 [3, tasks]: losses, weights, tokens."""
        out = self.model(pack)
        by_task = (out.task_loss, out.task_weight, out.task_tokens)
        return out.loss_sum, torch.stack([values.detach().double() for values in by_task])


class Engine:
    """A model under DeepSpeed. All public methods are collective: every rank calls them."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        world: World,
        settings: Mapping[str, Any],
        deferred: Placeholders | None = None,
    ) -> None:
        """`settings` is a `deepspeed_config`; `optimizer` holds all that `model` trains.

        deferred: frozen weights still to be read (ZeRO-3 only). Each is partitioned as it is read,
            so that no rank ever holds the whole model.
        """
        self.world = world
        self.settings = dict(settings)
        self._stage: int = settings["zero_optimization"]["stage"]
        self._offloads = "offload_optimizer" in settings["zero_optimization"]
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert grouped == {id(p) for p in self._named.values()}, (
            "the optimiser holds other parameters than the model trains"
        )
        self._shapes = {name: tuple(p.shape) for name, p in self._named.items()}
        self._updates = 0
        if deferred is not None:
            assert self._stage == 3, "only ZeRO-3 partitions frozen weights"
            _partition(model, deferred, self.settings, world.device)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=_PackLoss(model), optimizer=optimizer, config=self.settings
        )
        self._create_moments()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trained parameter by name."""
        return dict(self._shapes)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the last step, by part of the model."""
        groups = self._optimizer.param_groups
        return {group["name"].removesuffix("_vectors"): group["lr"] for group in groups}

    def step(
        self,
        packs: Sequence[Packs],
        *,
        num_packs: int,
        normaliser: float,
        lr_factor: float,
        make_empty: Callable[[], Packs],
        check: Callable[[float, float], str | None] = check_finite,
    ) -> StepResult:
        """One optimiser update over all packs of all ranks.

        `num_packs` and `normaliser` are agreed by all ranks; a rank with fewer packs runs
        `make_empty()` (weight zero) instead, because every forward and backward is collective under
        ZeRO. The gradient is that of sum(w * ce) / normaliser over the whole step, whatever the
        packing, the ranks or the ZeRO stage.

        `check` gets the loss and the gradient norm before the update, the same on all ranks, and
        returns a reason not to use the step, or None.

        Raises:
            BadNumbers: `check` returned a reason. On every rank; the step has changed nothing.
        """
        assert len(packs) <= num_packs and num_packs > 0 and normaliser > 0
        set_learning_rate(self._optimizer.param_groups, lr_factor)
        scale = gradient_scale(normaliser, self.world.world_size)
        totals: Tensor | None = None
        clock = Stopwatch(self.world.device)
        for index in range(num_packs):
            pack = packs[index] if index < len(packs) else make_empty()
            self._engine.set_gradient_accumulation_boundary(index == num_packs - 1)
            with clock:
                loss_sum, by_task = self._engine(pack.to(self.world.device))
            self._engine.backward(loss_sum * scale, scale_wrt_gas=False)
            totals = by_task if totals is None else totals + by_task
        assert totals is not None
        loss_here = float(totals[0].sum())
        if self.world.world_size > 1:
            dist.all_reduce(totals)
        task_loss, task_weight, task_tokens = totals.tolist()
        result = StepResult(
            loss=mean_loss(task_loss, normaliser),
            task_loss=task_loss,
            task_weight=task_weight,
            task_tokens=[int(count) for count in task_tokens],
            grad_norm=self._gradient_norm(),
            forward_s=clock.seconds(),
        )
        reason = check(result.loss, result.grad_norm)
        if reason is not None:
            self._discard()
            rank_loss = gather_rows(self.world, [loss_here])[:, 0].tolist()
            raise BadNumbers(reason, result, rank_loss)
        self._engine.step()
        assert self._stage == 0 or self._engine.was_step_applied()
        self._updates += 1
        return result

    def _gradient_norm(self) -> float:
        """L2 norm of the accumulated gradient of all ranks, before clipping; collective.

        NaN if the gradient is not finite.
        """
        if self._stage == 0:  # gradients are whole and reduced
            grads = [p.grad.float() for p in self._named.values() if p.grad is not None]
            return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))
        if self._stage == 3:
            norm = float(combine_grad_norm_groups(self._optimizer._get_norm_groups()))
        else:
            norm = float(self._optimizer.scaled_global_norm())
        return norm if norm >= 0 else math.nan  # DeepSpeed returns -1 if it is not finite

    def _discard(self) -> None:
        """Drops the accumulated gradient; collective."""
        if self._stage == 0:
            self._engine.zero_grad()
            return
        # DeepSpeed skips a step by itself if the gradient is not finite.
        if self._offloads:  # the gradient is on the host, and DeepSpeed checks its norm
            for norm in self._optimizer.norm_for_param_grads.values():
                norm.fill_(math.inf)
            self._engine.step()
            assert not self._engine.was_step_applied()
            sums = self._optimizer.averaged_gradients
            sums.update(dict.fromkeys(sums))  # else DeepSpeed 0.19 adds the next step's to them
            return
        groups = self._optimizer.averaged_gradients.values()
        gradients = [gradient for group in groups for gradient in group]
        for gradient in gradients:
            gradient.fill_(math.inf)
        self._engine.step()
        assert not self._engine.was_step_applied()
        for gradient in gradients:  # stage 3 reuses the buffers and never writes their padding
            gradient.zero_()

    # State in full tensors -------------------------------------------------------------------

    def export_state(self) -> TrainedState:
        """Collective: master weights and moments, gathered on rank 0 only."""
        params: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for name, param in self._named.items():
            if self._stage == 0:
                state = self._optimizer.state[param]
                tensors = [param.detach(), *(state[key] for key in MOMENTS)]
            else:
                tensors = [safe_get_full_fp32_param(param)]
                tensors += [safe_get_full_optimizer_state(param, key) for key in MOMENTS]
            if self.world.is_main:
                # Clones: a saved tensor must not change with the next step.
                shape = self._shapes[name]
                full = [t.detach().float().cpu().clone().reshape(shape) for t in tensors]
                params[name] = full[0]
                for key, tensor in zip(MOMENTS, full[1:], strict=True):
                    moments[key][name] = tensor
        return TrainedState(params=params, updates=self._updates, **moments)

    def import_params(self, params: Mapping[str, Tensor], *, some: bool = False) -> None:
        """Collective: sets the trained weights (model copy and fp32 master) on every rank.

        some: parameters that are not given keep their values.

        Raises:
            ValueError: names or shapes differ from the parameters that this stage trains.
        """
        self._check(params, some=some)
        for name, param in self._named.items():
            if name not in params:
                continue
            value = params[name].to(self.world.device, torch.float32)
            if self._stage == 3:
                with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                    if self.world.is_main:
                        param.data.copy_(value)
                safe_set_local_fp32_param(param, self._local_part(param, value))
            else:
                param.data.copy_(value)
                if self._stage > 0:
                    safe_set_full_fp32_param(param, value)

    def import_state(self, state: TrainedState) -> None:
        """Collective: continues from `state`, on any ZeRO stage and any number of ranks.

        Every rank passes the full state (unlike `export_state`, which fills rank 0 only).
        """
        self.import_params(state.params)
        moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        for tensor in self._owned:
            self._base_optimizer.state[tensor]["step"].fill_(state.updates)
        for key, tensors in moments.items():
            self._check(tensors)
            for name, param in self._named.items():
                value = tensors[name].to(self.world.device, torch.float32)
                if self._stage == 0:
                    self._optimizer.state[param][key].copy_(value)
                elif self._stage == 3:
                    safe_set_local_optimizer_state(param, self._local_part(param, value), key)
                else:
                    safe_set_full_optimizer_state(param, value, key)
        self._updates = state.updates

    def _create_moments(self) -> None:
        """Creates AdamW's state before its first step, so that it can be set and read at any time.

        DeepSpeed 0.19 links names to states after it has stepped the first group, when the states
        of further groups do not exist yet. States created beforehand are linked for every group.
        """
        for tensor in self._owned:
            zeros = {key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS}
            self._base_optimizer.state[tensor] = {"step": torch.tensor(0.0), **zeros}
        if 0 < self._stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _base_optimizer(self) -> torch.optim.AdamW:
        base: torch.optim.AdamW = self._optimizer.optimizer if self._stage > 0 else self._optimizer
        return base

    @property
    def _owned(self) -> Sequence[Tensor]:
        """The tensors that this rank's AdamW updates: flat fp32 partitions under ZeRO."""
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        if self._stage > 0:
            return list(self._optimizer.single_partition_of_fp32_groups)
        return list(self._named.values())

    def _local_part(self, param: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's slice of a ZeRO-3 parameter, zero-padded as DeepSpeed pads it."""
        partition: Tensor = param.ds_tensor  # type: ignore[attr-defined]  # DeepSpeed adds it
        size = partition.numel()
        flat = value.flatten()
        padded = torch.nn.functional.pad(flat, (0, size * self.world.world_size - flat.numel()))
        return padded.narrow(0, size * self.world.rank, size)

    def _check(self, tensors: Mapping[str, Tensor], *, some: bool = False) -> None:
        actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if some:
            actual = self._shapes | actual
        if actual == self._shapes:
            return
        missing = sorted(set(self._shapes) - set(actual))
        extra = sorted(set(actual) - set(self._shapes))
        other = sorted(n for n in set(actual) & set(self._shapes) if actual[n] != self._shapes[n])
        raise ValueError(
            "saved weights do not fit the parameters this stage trains: "
            f"missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)}), "
            f"other shape {[(n, actual[n], self._shapes[n]) for n in other[:3]]} ({len(other)}); "
            "keep model.lora and model.projector as they were in the run that saved them"
        )

    def close(self) -> None:
        """Releases DeepSpeed's hooks so that the model can be used on its own."""
        self._engine.destroy()


class SharedWeights:
    """A model for inference whose weights are divided among the ranks (ZeRO-3)."""

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        precision: str,
        deferred: Placeholders | None = None,
    ) -> None:
        """Collective. deferred: weights still to be read, as for `Engine`."""
        settings = deepspeed_config(
            zero_stage=3,
            precision=precision,
            clip=1.0,
            world_size=world.world_size,
            num_trainable=1,
        )
        if deferred is not None:
            _partition(model, deferred, settings, world.device)
        model.requires_grad_(False)
        self._engine, *_ = deepspeed.initialize(model=model, config=settings)

    def close(self) -> None:
        """Releases DeepSpeed's hooks; the weights stay partitioned."""
        self._engine.destroy()


def _partition(
    model: nn.Module, deferred: Placeholders, settings: Mapping[str, Any], device: torch.device
) -> None:
    """Collective: gives each placeholder its value and keeps this rank's share of it."""
    first: Any = None  # a parameter, to which DeepSpeed adds convert_to_zero_parameters
    for param, value in deferred.values():
        param.data = value.to(device)
        if first is None:
            holder = nn.Module()
            holder.register_parameter("weight", param)
            deepspeed.zero.Init(module=holder, config_dict_or_path=dict(settings))
            first = param
        else:
            first.convert_to_zero_parameters(param_list=[param])
    assert first is not None
    rest = [param for param in model.parameters() if not hasattr(param, "ds_id")]
    first.convert_to_zero_parameters(param_list=rest)
