"""A run that SIGTERM ends, as of a scheduler that takes the machine back: a checkpoint, and no result yet."""

from __future__ import annotations

from typing import Any

from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from ..errors import StoppedError
from .distributed import from_all


class StopCallback(JITCheckpointCallback):
    """``enable_jit_checkpoint`` whose checkpoint continues exactly, and without which a stop is no end of the run.

    transformers saves before a step is logged and evaluated, and some steps between their gradients and their update,
    when random numbers are drawn and, with ``step_in_backward``, weights are changed already. Here it is the Trainer's
    own save after a step. Several processes stop after the same one, whichever was told first.

    Args:
        manager: Of the Trainer's own callback; it listens to the signal.

    Attributes:
        stopped: Whether training was ended by this.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        super().__init__()
        self.jit_manager: CheckpointManager = manager
        self.stopped = False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """No checkpoint: the step that has begun would be made and lost."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """No checkpoint: it would be none of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop and save, if that was asked for; also before an evaluation, which may take longer than there is left."""
        if not self.stopped and not any(from_all(self.jit_manager.is_checkpoint_requested)):
            return
        if control.should_evaluate and not self.stopped:
            trainer = self.jit_manager.trainer
            trainer._save_checkpoint(trainer.model, trial=None)
        self.stopped = control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As after a step; the Trainer also comes here from a stop within an epoch, where nothing of an end is due."""
        if self.stopped and state.epoch % 1:
            control.should_log = control.should_evaluate = control.should_save = False
        else:
            self.on_step_end(args, state, control)


def stop_between_steps(trainer: Any) -> None:
    """Put ``StopCallback`` in the place of the Trainer's own, if it has one."""
    own = trainer.pop_callback(JITCheckpointCallback)
    if own is not None:
        trainer.add_callback(StopCallback(own.jit_manager))


def check_not_stopped(trainer: Any) -> None:
    """Whether training that has returned was ended by SIGTERM, and not by its last step or another callback.

    Raises:
        StoppedError: If it was.
    """
    state, callbacks = trainer.state, trainer.callback_handler.callbacks
    stopped = any(isinstance(each, StopCallback) and each.stopped for each in callbacks)
    if stopped and state.global_step < state.max_steps:
        raise StoppedError(
            f"stopped at step {state.global_step} of {state.max_steps}; continue with --resume_from_checkpoint auto"
        )
