"""TRL's SFTTrainer, as its users call it, on rows that are tokenised and in order already.

Where it would differ from the other arms by something else than speed, it is made equal, and only there:
- A quantised model's LoRA weights are cast to bf16 by SFTTrainer: they are put back to fp32, with the values that they had.
- The order: `train_sampling_strategy="sequential"`.
- `dataset_kwargs={"skip_prepare_dataset": True}`: the packed arm takes the same packed rows as ours instead of packing by itself, in
  the form that TRL's own packing gives (`seq_lengths`).
- Gradient checkpointing, on by default, is off but in the arm `trl-default`.
Its metrics (entropy and accuracy of each batch) are computed: they are a part of what it does.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peers.batches import peer_model, peer_steps, split
from throughput_meter import Job, Meter
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

KEYS = ("input_ids", "labels", "attention_mask", "position_ids")


class _Clock(TrainerCallback):
    def __init__(self, meter: Meter, losses: list[torch.Tensor]) -> None:
        self.meter, self.losses = meter, losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = torch.stack(self.losses).sum()
        self.losses.clear()
        self.meter.step_ended(loss)
        if state.global_step == state.max_steps:
            self.meter.stop_counting()


def train(job: Job, meter: Meter) -> None:
    import trl

    meter.facts["versions"]["trl"] = trl.__version__
    recipe, model = peer_model(job, torch.device(job.device))
    steps = list(peer_steps(recipe, job.packed))
    names = ("input_ids", "labels", "seq_lengths")
    rows = Dataset.from_list([{n: t.tolist() for n, t in zip(names, row, strict=False)} for step in steps for row in step])
    optim = recipe.optim
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=len(steps[0]) // job.micro_batch,
            num_train_epochs=1,
            packing=job.packed,
            max_length=recipe.data.max_length,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            gradient_checkpointing=job.checkpointing,
            learning_rate=optim.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            bf16=job.dtype == "bf16",
            fp16=job.dtype == "fp16",
            use_cpu=job.device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=recipe.seed,
        )
        first = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        losses: list[torch.Tensor] = []
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(recipe.model.base),
            callbacks=[_Clock(meter, losses)],
        )
        for name, parameter in trainer.model.named_parameters():
            if name in first:
                parameter.data = first[name]
        training_step, compute_loss, collator = trainer.training_step, trainer.compute_loss, trainer.data_collator
        trainer.data_collator = lambda examples: meter.on_host(collator, examples)

        def noting_the_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(training_step(*args, **kwargs))
            return losses[-1]

        def noting_the_batch(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if job.counted:
                with _disable_current_modes(), torch._C.DisableTorchFunction():  # this look is no part of its step
                    found = [(ids.copy(), labels.copy()) for ids, labels in split(*(inputs.get(k) for k in KEYS))]
                meter.fed(found)
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.training_step, trainer.compute_loss = noting_the_loss, noting_the_batch
        meter.model_is_ready(trainer.model)
        trainer.train()
