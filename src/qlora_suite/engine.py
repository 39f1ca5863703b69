"""The engines: what differs between one process, DDP, DeepSpeed ZeRO and FSDP2 when gradients are made, exchanged and applied, and
when what is sharded has to be put together for saving.

    accelerator, dtype = start(...)               # what `accelerate launch` described
    engine = engine_for(accelerator, model, optimizer, dtype, max_grad_norm=1.0)
    with engine.accumulate(last=...):             # gradients are exchanged once a step
        engine.backward(loss_sum, num_tokens)     # loss of the step = sum over all ranks / supervised tokens of the step
    loss_sum, grad_norm = engine.totals(losses)   # of the whole step and gradient; a caller who does not like them leaves it out
    engine.step(apply=math.isfinite(grad_norm))
    engine.full_parameters(), engine.optimizer_state()    # whole tensors by name, whatever the sharding

To add an engine: a subclass of `Engine` below with what it does otherwise, an entry in `engine_for`, a file in accelerate_configs/.

Precision is one and the same everywhere: trained weights, their gradients and the optimiser are fp32, the forward pass runs under
torch's autocast, and no engine is asked to cast anything. Accelerate's and DeepSpeed's own bf16 and fp16 modes round the trained
weights (DeepSpeed) or the gradients' sums (FSDP2) to 16 bits.
"""

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from qlora_suite import compatibility
from qlora_suite import optimizer as optimizers
from qlora_suite.extension_builds import release_dead_builds
from qlora_suite.model import compute_dtype
from qlora_suite.ranks import gathered, together
from qlora_suite.sharding import whole

TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Where a tracker's package is not called as the tracker."""
TRUE = ("true", "1", "yes")
WORLDS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where torchrun or an mpirun says how many processes there are, as accelerate reads it."""
DEEPSPEED_KEYS = {
    *("zero_optimization", "gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"),
    *("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "bf16", "fp16", "torch_autocast"),
}
"""Of a DeepSpeed config: those that accelerate writes, and those that are checked below."""
COLLECTIVE_TIMEOUT = timedelta(minutes=20)


# ---- starting -------------------------------------------------------------------------------------------------------------------


def start(
    trackers: Sequence[str] = (), folder: str | None = None, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> tuple[Accelerator, torch.dtype]:
    """The accelerator that `accelerate launch` described, and the type to compute in. Trackers write to `folder`; a collective that
    takes longer than `timeout` ends the run.

    Raises ValueError if the environment asks for something that would change the arithmetic behind the recipe's back, or that the
    engines here do not do.
    """
    for tracker in trackers:
        if not any(importlib.util.find_spec(package) for package in TRACKER_PACKAGES.get(tracker, (tracker,))):
            raise ValueError(
                f"tracking.trackers: {tracker} needs the package {TRACKER_PACKAGES.get(tracker, (tracker,))[0]}; pip install it"
            )
    _check_environment()
    if torch.backends.mps.is_available():  # a Mac
        os.environ["ACCELERATE_USE_CPU"] = "true"  # bitsandbytes and our precision rule know CUDA and the CPU
    # Accelerator() would read this by itself, but the state is made before it, to know the device that decides the precision
    state = PartialState(cpu=_asks_for_cpu(), timeout=timeout)
    _check_device(state)
    _check_world(state)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=list(trackers) or None,
        project_dir=folder,
        # by default DDP sends the first rank's buffers (rotary frequencies, quantisation tables: all frozen) before every forward pass
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    for name, kind in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in TRUE and accelerator.distributed_type != kind:
            raise ValueError(
                f"the accelerate config asks for {name}, which needs GPUs and several processes; here accelerate would run something else "
                "without a word: use accelerate_configs/single_gpu.yaml or cpu.yaml, or ddp.yaml with ACCELERATE_USE_CPU=true"
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator)
    with together(accelerator):
        mine = compute_dtype(state.device, asked)
    # where the cards differ, the oldest decides: an older card says fp16, a newer one bf16
    return accelerator, max(gathered(accelerator, mine), key=[torch.float32, torch.bfloat16, torch.float16].index)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Compute in `dtype` what may be computed in it; nothing happens for fp32. A context manager and a decorator."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _asks_for_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE


def _check_environment() -> None:
    """Raises ValueError for settings of the accelerate config that the recipe decides, or that no engine here can keep."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if 0 < gpus < processes and not _asks_for_cpu():
        raise ValueError(
            f"{processes} processes were launched on this machine, which has {gpus} GPU{'s'[: gpus > 1]}, one for each process; use "
            f"--num_processes {gpus * int(os.environ.get('WORLD_SIZE', processes)) // processes}"
        )
    # what `accelerate launch` leaves behind where it was asked for several processes on a CPU and starts one (KMP_BLOCKTIME: on a CPU)
    several = all(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "KMP_BLOCKTIME", "MASTER_ADDR", "MASTER_PORT"))
    if several and not any(name in os.environ for name in WORLDS):
        raise ValueError(
            "accelerate launch was asked for several processes, and under a config with use_cpu (or --cpu) it starts one without a word; "
            "several processes on a CPU: ACCELERATE_USE_CPU=true accelerate launch --config_file accelerate_configs/ddp.yaml "
            "--num_processes 2 ... (if one was meant: unset MASTER_ADDR MASTER_PORT)"
        )
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in TRUE:
            raise ValueError(
                f"the accelerate config asks for {name.lower()}, under which ranks share rows, and here every rank has its own; use one of "
                "accelerate_configs/"
            )
    accumulation = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto"):
        raise ValueError(
            f"the accelerate config sets gradient_accumulation_steps to {accumulation}; accumulation follows from train.rows_per_step, "
            "so remove it there"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in TRUE:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "the accelerate config asks for FSDP1, which trains quantised weights wrongly without a word; set fsdp_version: 2, as "
                "accelerate_configs/fsdp.yaml does"
            )
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() in TRUE:
            raise ValueError("fsdp_offload_params moves 4-bit weights in a way that they do not survive; remove it")
        if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() in TRUE:
            raise ValueError(
                "fsdp_activation_checkpointing renames the weights, so that nothing could read what is saved; remove it: the recipe's "
                "train.gradient_checkpointing does it, by itself where memory is short"
            )
        # Every rank loads the base itself, in turn; accelerate's way would leave all but the first with empty 4-bit weights.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def _check_device(state: PartialState) -> None:
    """Raises ValueError if a GPU was meant, or is there, and the run would quietly use the CPU instead."""
    if state.device.type != "cpu":
        return
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower()  # set by `accelerate launch`, and by a person who means it
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    unusable = not asked and not hidden and Path("/proc/driver/nvidia/version").exists()
    alone = not _asks_for_cpu() and state.num_processes < int(os.environ.get("WORLD_SIZE", "1"))  # a config for several GPUs
    if asked not in ("", *TRUE) or unusable or alone:
        raise ValueError(
            "this is meant for a GPU, but torch sees none and would quietly use the CPU; see `nvidia-smi` and `python -m "
            "torch.utils.collect_env` (README: torch for your machine), or use accelerate_configs/cpu.yaml or ACCELERATE_USE_CPU=true"
        )


def _check_world(state: PartialState) -> None:
    """Raises ValueError if the processes that were launched did not find each other."""
    asked_for = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != asked_for:
        raise ValueError(
            f"{asked_for} processes were launched but each found a world of {state.num_processes}, so all would train alone and overwrite "
            "each other; check distributed_type in the accelerate config"
        )


def _configure_deepspeed(accelerator: Accelerator) -> None:
    """What DeepSpeed must know before it wraps a model. Raises ValueError for settings that would change the curve."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # transformers would shard the base while loading it, before it is quantised, and PEFT would take the GPU's functions for granted
    unset_hf_deepspeed_config()
    release_dead_builds()
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero["stage"] not in (2, 3):
        raise ValueError(f"zero_stage is {zero['stage']}; use 2, 3, or accelerate_configs/ddp.yaml, which is stage 0")
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device != "none":
            raise ValueError(
                f"the accelerate config sets {part}_device to {device}, which changes the optimiser's arithmetic; an adapter is "
                "too small to gain from it: set it to none"
            )
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", "none", None):
        raise ValueError(f"the accelerate config sets gradient_clipping to {clipping}; the recipe's optim.max_grad_norm does; remove it")
    for key in ("bf16", "fp16", "torch_autocast"):
        if config.get(key, {}).get("enabled", "auto") in (True, "true"):
            raise ValueError(
                f"the DeepSpeed config enables {key}, which would round trained weights or gradients to 16 bits; remove it, and set "
                "mixed_precision in the accelerate config, or nothing: it follows the hardware"
            )
    if unknown := sorted(config.keys() - DEEPSPEED_KEYS):
        raise ValueError(
            f"the DeepSpeed config sets {', '.join(unknown)}, which may change what is learnt and is not tried here; remove it (known: "
            f"{', '.join(sorted(DEEPSPEED_KEYS))})"
        )
    if zero["stage"] == 3:  # by default DeepSpeed keeps 1e9 elements gathered: all of a 4-bit base of 2 B weights, two in an element
        zero.setdefault("stage3_max_live_parameters", 100_000_000)
        zero.setdefault("stage3_max_reuse_distance", 100_000_000)
    config.update(gradient_accumulation_steps=1, train_micro_batch_size_per_gpu=1)  # micro-batches are marked by `accumulate`


def stand_in_for_gpus(timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Let a config that is made for GPUs run on CPU processes over gloo. For scripts/verify.py and the tests alone, before `start`.

    accelerate has no CPU path for DeepSpeed and FSDP2, but the libraries themselves do:
    - DeepSpeed: its process group is made over gloo before anybody asks for NCCL. ACCELERATE_USE_CPU must not be set: with it
      accelerate would run plain DDP without a word.
    - FSDP2: processes of kind MULTI_CPU are declared MULTI_GPU, which is what the path to `fully_shard` asks for; all else follows
      the device, which stays the CPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in TRUE:
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["DS_ACCELERATOR"] = "cpu"
        PartialState(backend="gloo", timeout=timeout)
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState(cpu=True, timeout=timeout)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in TRUE:
        PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU, device=torch.device("cpu"))


# ---- the engines ----------------------------------------------------------------------------------------------------------------


class Engine:
    """One process, or DDP: every rank holds all weights. The other engines override what they do otherwise."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, max_grad_norm: float
    ) -> None:
        self.accelerator = accelerator
        self.name = name_of(accelerator)
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.unwrapped = model
        """For evaluation and previews."""
        if dtype != torch.float32:
            # Inside the forward pass: DeepSpeed turns off an autocast that was opened around it.
            model.forward = autocast(accelerator.device, dtype)(model.forward)
        # accelerate has no scaler on a CPU, and `step_was_skipped` is wrong for fused AdamW: this one is ours.
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=dtype == torch.float16)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.model, self.optimizer = self._wrap(model, optimizer)
        """What to call in training, and what `step` applies."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert list(self.parameters) == names, "wrapping has renamed the weights: nobody could read what is saved"

    def _wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return self.accelerator.prepare_model(model), optimizer

    # -- a step

    def accumulate(self, last: bool) -> AbstractContextManager:
        """Around one forward and backward pass; all but the last of a step keep their gradients to themselves."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss_sum: Tensor, num_tokens: int) -> None:
        """Add the gradient of `loss_sum / num_tokens` (tokens of the whole step, all ranks). The average over ranks is undone here."""
        self.scaler.scale(loss_sum * (self.accelerator.num_processes / num_tokens)).backward()

    def set_lr(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def totals(self, losses: Sequence[Tensor], *flags: bool) -> list[float]:
        """[sum of this step's losses, norm of its gradient, sums of what was measured beside the losses, of each flag on how many ranks it
        is set], over all ranks. losses: of each micro-batch, [1 + measures]

        The norm is that before clipping, with the loss scale undone. Once a step, before `step`: all that the host asks of a GPU in a
        step is asked here, at once, for each question makes it wait.
        """
        self.scaler.unscale_(self.optimizer)
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = whole(self._norm).double()
        loss_sum, *rest = self._summed(torch.stack(list(losses)).double().sum(dim=0), flags)
        return torch.stack([loss_sum, norm, *rest]).tolist()

    def _summed(self, values: Tensor, flags: Sequence[bool]) -> Tensor:
        """Values of the device and flags of the host, summed over the processes in one exchange. [values + flags] float64"""
        mine = torch.tensor(flags, dtype=torch.float64).to(self.accelerator.device, non_blocking=True)
        mine = torch.cat([values.double(), mine])
        return mine if self.alone else self.accelerator.reduce(mine, "sum")

    def step(self, apply: bool) -> None:
        """Clip the gradient and apply it, or leave it out; it is gone in any case. All ranks must come to the same `apply`."""
        if apply:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, self._norm)
            self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget what `backward` has added up."""
        self.optimizer.zero_grad(set_to_none=True)

    def after_a_look(self) -> None:
        """To be called after a forward pass between `backward` and `step`."""

    def loss_scale(self) -> float:
        """What fp16 losses are multiplied by; 1 in other precisions."""
        return self.scaler.get_scale()

    # -- what is saved and restored

    def full_parameters(self) -> dict[str, Tensor]:
        """Every trained parameter, whole, on the CPU, by its name in the unwrapped model.

        All ranks must call it; the main process alone gets them, so that a machine holds them once.
        """
        return self._collected({name: lambda p=p: self._whole_weight(p) for name, p in self.parameters.items()})

    def extremes(self) -> dict[str, dict[str, float]]:
        """Of each trained tensor and its gradient: the largest magnitude among the finite values, and how many are not finite.

        Before `step`. All ranks must call it, and all get it.
        """
        found = {}
        for name, p in self.parameters.items():
            gradient = self._whole_gradient(p)
            found[name] = extremes_of("weight", self._whole_weight(p)) | (extremes_of("gradient", gradient) if gradient is not None else {})
        return found

    def _whole_weight(self, parameter: nn.Parameter) -> Tensor:
        return whole(parameter.detach())

    def _whole_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else whole(parameter.grad)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors (whole, on the CPU) and plain numbers, as `name:key`; the same under every engine.

        All ranks must call it; the main process alone gets them.
        """
        return optimizers.state_tensors(self.optimizer, self.parameters, keep=self.accelerator.is_main_process)

    def _collected(self, gather: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        """Call all, and keep the results on the main process."""
        kept = {}
        for name, whole_tensor in gather.items():
            tensor = whole_tensor()
            if self.accelerator.is_main_process:
                kept[name] = tensor.detach().cpu().clone()
        return kept

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put back what `optimizer_state` gave, under whichever engine it was."""
        optimizers.restore_state(self.optimizer, self.parameters, tensors, numbers)

    def state(self) -> dict[str, Any]:
        """The fp16 scaler's state; empty in other precisions."""
        return self.scaler.state_dict()

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))

    # -- what ranks tell each other

    @property
    def alone(self) -> bool:
        """Is this the only process? Then what ranks tell each other costs nothing."""
        return self.accelerator.num_processes == 1

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value summed over the processes, in float64."""
        if self.alone:
            return [float(value) for value in values]
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device), "sum").tolist()

    def any_rank(self, flag: bool) -> bool:
        """The same answer on every rank: true if it is true on one."""
        return self.sum_over_ranks(float(flag))[0] > 0


class FSDP2(Engine):
    """Every weight is sharded over the ranks (as a DTensor) and gathered when its layer runs."""

    def _wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        from torch.distributed.fsdp import register_fsdp_forward_method

        # Of a hook that an in-place operation on a layer's output would drop: the models here have none, as the tests' curves prove.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        wrapped, prepared = self.accelerator.prepare(model, optimizer)
        register_fsdp_forward_method(wrapped, "generate")  # it calls the layers without passing through the root's forward
        return wrapped, prepared.optimizer

    def after_a_look(self) -> None:
        """The root keeps its weights gathered after a forward pass, until a backward pass comes: the next step would use the old ones."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Zero(Engine):
    """DeepSpeed ZeRO: gradients and optimiser (stage 2), weights too (stage 3) are sharded over the ranks.

    DeepSpeed runs the backward pass, averages, clips, skips non-finite steps and applies; it is told which micro-batch is a step's last.
    """

    def _wrap(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_clipping"] = self.max_grad_norm
        # By default DeepSpeed holds 2 GB for gradients in flight; all of an adapter's are less.
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config["zero_optimization"].setdefault("reduce_bucket_size", min(trained, 500_000_000))
        wrapped, _ = self.accelerator.prepare(model, optimizer)
        wrapped = self.accelerator.deepspeed_engine_wrapped.engine
        if wrapped.zero_optimization_partition_weights():
            self._gather_token_rows(model)
        if self.dtype == torch.float16:
            from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

            # As DeepSpeed's own fp16 mode would have, which also casts the trained weights to 16 bits.
            wrapped.optimizer.loss_scaler = DynamicLossScaler(
                self.scaler.get_scale(),
                scale_window=self.scaler.get_growth_interval(),
                min_scale=2.0**-16,
                delayed_shift=1,
                consecutive_hysteresis=False,
                raise_error_at_min_scale=False,  # `anomalies.check_skipped` says it better
            )
        return wrapped, wrapped.optimizer

    @staticmethod
    def _gather_token_rows(model: nn.Module) -> None:
        """PEFT computes an embedding with trained rows from parameters of modules that it never calls, and ZeRO-3 gathers the parameters
        of those that are called: it has to be told.
        """
        from deepspeed.runtime.zero import register_external_parameter
        from peft.tuners.trainable_tokens import TrainableTokensLayer

        for module in model.modules():
            if isinstance(module, TrainableTokensLayer):
                for parameter in (*module.trainable_tokens_delta.values(), module.get_base_layer().weight):
                    register_external_parameter(module, parameter)

    def accumulate(self, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss_sum: Tensor, num_tokens: int) -> None:
        self.model.backward(loss_sum * (self.accelerator.num_processes / num_tokens))

    def totals(self, losses: Sequence[Tensor], *flags: bool) -> list[float]:
        """As above. DeepSpeed tells the norm when the step is done, which is too late to leave it out."""
        parts = [g for gradients in self.optimizer.averaged_gradients.values() for g in gradients or ()]  # this rank's
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in parts]).sum()
        loss_sum, *measured = torch.stack(list(losses)).double().sum(dim=0)
        loss_sum, total, *rest = self._summed(torch.stack([loss_sum, squares, *measured]), flags).tolist()
        self._norm = math.sqrt(total) / self.loss_scale()
        return [loss_sum, self._norm, *rest]

    def step(self, apply: bool) -> None:
        scaler = dict(vars(self.optimizer.loss_scaler))
        if not apply:
            self._poison()
        self.model.step()
        assert self.model.was_step_applied() == apply, "DeepSpeed did not agree"
        if not apply and math.isfinite(self._norm):
            vars(self.optimizer.loss_scaler).update(scaler)  # it was no overflow of fp16

    def _poison(self) -> None:
        """Make DeepSpeed skip the step, and clear everything it keeps for it, in its own way."""
        for gradients in self.optimizer.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(math.nan)

    def _whole_weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).reshape(shape_of(parameter))

    def _whole_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
        return None if gradient is None else gradient.reshape(shape_of(parameter)) / self.loss_scale()

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = list(self.optimizer.optimizer.state.values())
        if not states:  # no step has been applied yet
            return {}, {}
        gather = {}
        for name, p in self.parameters.items():
            gather[f"{name}:step"] = lambda: states[0]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                gather[f"{name}:{key}"] = lambda p=p, key=key: safe_get_full_optimizer_state(p, key).reshape(shape_of(p))
        return self._collected(gather), {}

    def load_optimizer_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        assert not numbers, f"torch's AdamW keeps tensors alone, found {sorted(numbers)[:3]}"
        if not tensors:
            return
        optimizers.check_names(tensors, self.parameters)
        zero = self.optimizer
        stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        step = next(value for key, value in tensors.items() if key.endswith(":step"))
        for flat in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
            # AdamW makes its moments in the first step; they have to be there before they can be set
            zero.optimizer.state[flat] = {
                "step": step.clone().to(flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if not stage3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, p in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                value = tensors[f"{name}:{key}"].to(self.accelerator.device)
                if stage3:  # safe_set_full_optimizer_state fails where the last rank's part is padded
                    safe_set_local_optimizer_state(p, self._part_of(value, p), key)
                else:
                    safe_set_full_optimizer_state(p, value, key)

    def _part_of(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a whole tensor, as ZeRO-3 cuts it: flat, in equal parts, the last padded with zeros."""
        size, rank = parameter.partition_numel(), self.accelerator.process_index
        part = value.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel()))

    def loss_scale(self) -> float:
        return float(self.optimizer.loss_scale)

    def state(self) -> dict[str, Any]:
        if self.dtype != torch.float16:
            return {}
        scaler = self.optimizer.loss_scaler  # in the words of torch's, so that a run can go on under another engine
        good_steps = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {**self.scaler.state_dict(), "scale": scaler.cur_scale, "_growth_tracker": good_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if state and self.dtype == torch.float16:
            scaler = self.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = state["scale"], state["_growth_tracker"], -1


def name_of(accelerator: Accelerator) -> str:
    """The engine that the accelerate config asked for, in compatibility.py's words."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return compatibility.FSDP2
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        return compatibility.ZERO3 if stage == 3 else compatibility.ZERO2
    return compatibility.DDP if accelerator.num_processes > 1 else compatibility.ONE


def engine_for(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, max_grad_norm: float
) -> Engine:
    """The engine that the accelerate config asked for, around a model whose weights are loaded and an optimiser that is new."""
    kinds = {DistributedType.DEEPSPEED: Zero, DistributedType.FSDP: FSDP2}
    return kinds.get(accelerator.distributed_type, Engine)(accelerator, model, optimizer, dtype, max_grad_norm)


def extremes_of(name: str, values: Tensor) -> dict[str, float]:
    """{"largest NAME": the largest magnitude of the finite values, "NAME not finite": how many are not}"""
    finite = values.isfinite()
    return {f"largest {name}": values.where(finite, 0).abs().max().item(), f"{name} not finite": int((~finite).sum())}


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, which under ZeRO-3 holds nothing itself."""
    return getattr(parameter, "ds_shape", parameter.shape)


def seed_for(seed: int, *position: int) -> None:
    """Set every random generator from the run's seed and a position in it (step, micro-batch, rank).

    Dropout is then a function of where the run is: there is no random state to save, and evaluation or previews disturb nothing.
    """
    mixed = seed
    for part in position:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    torch.manual_seed(mixed)
