"""Training that stops or skips at a loss, gradient or weight that is NaN or infinite, for any Trainer and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.guards import NonFiniteError, NonFiniteGradientError, norms
from ..optim.quantized import as_float
from ..optim.sharding import local
from .distributed import first_error

ON_NONFINITE = ("stop", "skip")


class FiniteSteps:
    """Mixin for a Trainer: no optimizer step from what is not finite, and nothing of the kind in a saved file.

    With several processes all stop, or skip, by the error of the first that has one.

    Loss and gradients are looked at before clipping, which spreads one NaN over all gradients, and before the Trainer's
    ``logging_nan_inf_filter`` replaces the loss. It costs one sum per gradient and one device-to-host copy per step.
    With fp16 the gradients are left to the loss scaler, which skips such steps by itself.

    Attributes:
        on_nonfinite: "stop" raises. "skip" drops the step with its whole accumulation window: weights, moments, step
            counts and routing stay as they are, the schedule and the data go on. Skipped steps are in
            ``state.log_history`` with the reason, so a resumed run knows them.
        nonfinite_limit: How many steps in a row may be skipped; one more raises.

    Example:
        class MyTrainer(FiniteSteps, Trainer): ...
    """

    on_nonfinite = "stop"
    nonfinite_limit = 10
    _losses: tuple[Tensor, ...] = ()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; at the end of an accumulation window, the look at it.

        Raises:
            NonFiniteError: If something is not finite, and it is a weight, or steps are not skipped, or too many were.
        """
        this: Any = self  # the Trainer that this class is mixed into
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._losses = (*self._losses, loss)
        if this.accelerator.sync_gradients:
            losses, self._losses = self._losses, ()
            # a loss of one process makes the gradients of all NaN: the cause comes before its consequence
            if (found := first_error(self._broken(losses), _is_of_gradients)) is not None:
                self._stop_or_skip(*found)
        return loss

    def _broken(self, losses: tuple[Tensor, ...]) -> tuple[NonFiniteError, bool] | None:
        """What this process sees that is not finite, and whether skipping heals it: not if a weight is the cause."""
        this: Any = self
        try:
            check_step(this.model, losses, gradients=this.accelerator.scaler is None)
        except NonFiniteError as error:
            try:
                check_weights(this.model, "nothing was updated")
            except NonFiniteError as cause:
                return cause, False
            return error, True
        return None

    def _stop_or_skip(self, error: NonFiniteError, heals: bool) -> None:
        this: Any = self
        if not heals:
            raise error
        step = this.state.global_step + 1
        if self.on_nonfinite == "stop":
            raise type(error)(f"step {step}: {error}") from error
        before = set(skipped_steps(this.state.log_history))
        row = next(n for n in range(len(before) + 1) if step - 1 - n not in before) + 1
        if row > self.nonfinite_limit:
            raise type(error)(
                f"step {step}: {error}. It is step {row} in a row; nonfinite_limit={self.nonfinite_limit} were skipped"
            ) from error
        print(f"skipped step {step}: {error}", flush=True)
        this.state.log_history.append({"step": step, "skipped": str(error)})
        if this.accelerator.scaler is None:  # which makes no step either, and must see the gradients to learn from it
            this.model.zero_grad()  # else the Trainer logs their norm
            this.accelerator.gradient_state._set_sync_gradients(False)  # accelerate's optimizer then makes no step

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save, if all weights and all of the optimizer's state are finite.

        Raises:
            NonFiniteError: Naming what is not; nothing has been written then.
        """
        this: Any = self
        if (error := first_error(_unfit(this.model, this.optimizer))) is not None:
            raise error
        super().save_model(*args, **kwargs)  # type: ignore[misc]


def _is_of_gradients(found: tuple[NonFiniteError, bool]) -> bool:
    return isinstance(found[0], NonFiniteGradientError)


def _unfit(model: nn.Module, optimizer: Any) -> NonFiniteError | None:
    """Why a model and its optimizer must not be saved, if there is a reason."""
    try:
        check_weights(model, "nothing was saved")
        check_state(model, optimizer)
    except NonFiniteError as error:
        return error
    return None


def skipped_steps(history: Sequence[dict[str, Any]]) -> list[int]:
    """The steps that were skipped, from a Trainer's ``state.log_history``."""
    return [entry["step"] for entry in history if "skipped" in entry]


def check_step(model: nn.Module, losses: Sequence[Tensor], gradients: bool = True) -> None:
    """Look at the losses of an accumulation window and at every gradient, in one device-to-host copy.

    Args:
        model: With its gradients.
        losses: One per batch, 0-dimensional.
        gradients: Whether to look at them.

    Raises:
        NonFiniteError: Naming the loss, else the first gradient.
    """
    graded = [(name, local(p.grad)) for name, p in model.named_parameters() if p.grad is not None and gradients]
    found = [*losses, *norms([grad for _, grad in graded])]
    finite = torch.stack([x.detach().to(losses[0].device, torch.float32) for x in found]).isfinite().tolist()
    if all(finite):
        return
    names = [name for (name, _), fine in zip(graded, finite[len(losses) :], strict=True) if not fine]
    if not all(finite[: len(losses)]):
        first = f" Nor are {len(names)} of {len(graded)} gradients, the first of {names[0]}." if names else ""
        raise NonFiniteError(
            f"the loss is not finite; nothing was updated.{first} Look at this batch, lower the learning rate, or "
            "leave such steps out with on_nonfinite=skip"
        )
    more = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
    raise NonFiniteGradientError(
        f"the gradient of {names[0]}{more} or its norm is not finite; nothing was updated. Look at this batch, lower "
        "the learning rate, clip with max_grad_norm, or leave such steps out with on_nonfinite=skip"
    )


def check_weights(model: nn.Module, consequence: str) -> None:
    """Look at every trained weight, and at every frozen one that is an ordinary tensor.

    Raises:
        NonFiniteError: Naming the first weight that is not finite, with the consequence.
    """
    named = [(n, local(p)) for n, p in model.named_parameters() if p.requires_grad or _ordinary(p)]
    name = _first_broken(named)
    if name is not None:
        raise NonFiniteError(
            f"the weight {name} is not finite; {consequence}. Lower the learning rate, or start from another model"
        )


def check_state(model: nn.Module, optimizer: Any) -> None:
    """Look at every floating tensor of an optimizer's state, if there is one.

    Raises:
        NonFiniteError: Naming the first that is not finite.
    """
    if optimizer is None:
        return
    names = {id(p): name for name, p in model.named_parameters()}
    named = [
        (f"{key} of {names.get(id(parameter), 'a parameter')}", local(as_float(value)))
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    name = _first_broken(named)
    if name is not None:
        raise NonFiniteError(f"the optimizer's {name} is not finite; nothing was saved. Lower the learning rate")


def _ordinary(parameter: Tensor) -> bool:
    """Not quantised: neither by a tensor subclass nor by a dtype of less than 16 bits."""
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.element_size() > 1


def _first_broken(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor is not finite; one device-to-host copy per device."""
    for device in dict.fromkeys(tensor.device for _, tensor in named):
        here = [(name, tensor) for name, tensor in named if tensor.device == device]
        finite = torch.stack([tensor.isfinite().all() for _, tensor in here]).tolist()
        broken = [name for (name, _), fine in zip(here, finite, strict=True) if not fine]
        if broken:
            return broken[0]
    return None
