"""What AdaLoRA needs beside PEFT's layers: the allocation of ranks at every step, and its penalty in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTTrainer


class AdaLoraCallback(TrainerCallback):
    """Runs AdaLoRA's rank allocation, without which it is LoRA with an orthogonality penalty.

    Of T steps the first T/10, and those of the warm-up, keep all ranks, and the last T/2 keep the final ones, about
    as in the longest runs of the paper.

    Source: arXiv:2303.10512, sections 3.3 and 4.1.
    """

    def __init__(self) -> None:
        self.model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set the schedule, now that the number of steps is known.

        Raises:
            ValueError: If there are fewer than two steps.
        """
        steps = state.max_steps
        if steps < 2:
            raise ValueError(f"adalora needs 2 steps or more to change its ranks, the run has {steps}: train longer")
        self.model = model
        config = self._config()
        config.total_step, config.tfinal = steps, min(steps // 2, steps - 2)
        config.tinit = min(max(steps // 10, args.get_warmup_steps(steps)), steps - config.tfinal - 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, while its gradients are there: PEFT's order."""
        self.model.base_model.update_and_allocate(state.global_step + 1)

    def changed_ranks(self) -> dict[str, float]:
        """Smallest, largest and mean rank that is left.

        Raises:
            ValueError: If the ranks never changed.
        """
        config = self._config()
        ranks = [sum(kept) for kept in (config.rank_pattern or {}).values()]
        if all(rank == config.init_r for rank in ranks):
            raise ValueError(f"adalora's ranks never changed from {config.init_r}, so this was not AdaLoRA: no result")
        return {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks)}

    def _config(self) -> Any:
        return self.model.peft_config["default"]


class AdaLoraTrainer(SFTTrainer):
    """SFTTrainer with AdaLoRA's penalty in the training loss.

    PEFT adds it to the model's ``loss``, but TRL 1.16 computes the loss from log-probabilities and never sees that.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss plus the penalty, once per step however many batches are accumulated."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return found
        penalty = orthogonality(self.model)
        if num_items_in_batch is not None:  # else the Trainer divides by the number of batches
            penalty = penalty / self.current_gradient_accumulation_steps
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty


def orthogonality(model: Any) -> Tensor:
    """PEFT's penalty: the weight times the mean of ‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (Frobenius) over all A and B.

    Source: arXiv:2303.10512, Eq. 4, there with squared norms.
    """
    norms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    return model.peft_config["default"].orth_reg_weight * torch.stack(norms).mean()
