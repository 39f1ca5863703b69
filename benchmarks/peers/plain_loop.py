"""The loop of accelerate's examples: padded batches, PEFT, `accelerator.prepare`, cross-entropy over all logits."""

import torch
from accelerate import Accelerator
from peers.batches import peer_model, peer_steps, split
from throughput_meter import Job, Meter
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence


def train(job: Job, meter: Meter) -> None:
    """A step is divided by the number of its supervised tokens, so that it is the same step as everybody's."""
    accelerator = Accelerator(cpu=job.device == "cpu", mixed_precision="no" if job.dtype == "fp32" else job.dtype)
    recipe, model = peer_model(job, accelerator.device)
    model.train()
    optim = recipe.optim
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], optim.learning_rate, optim.betas, optim.eps, optim.weight_decay
    )
    meter.model_is_ready(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in peer_steps(recipe, packed=False):
        num_tokens = sum((labels[1:] != -100).sum().item() for _, labels in step)
        step_loss = torch.zeros((), device=accelerator.device)
        for i in range(0, len(step), job.micro_batch):
            piece = step[i : i + job.micro_batch]
            ids, labels = (pad_sequence([one[k] for one in piece], batch_first=True, padding_value=fill) for k, fill in ((0, 0), (1, -100)))
            mask = pad_sequence([torch.ones_like(one[0]) for one in piece], batch_first=True)
            meter.fed(split(ids, labels, mask, None))
            ids, labels, mask = (t.to(accelerator.device) for t in (ids, labels, mask))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum") / num_tokens
            accelerator.backward(loss)
            step_loss += loss.detach()
        accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        meter.step_ended(step_loss.item())
    meter.stop_counting()
