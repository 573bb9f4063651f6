"""Checkpoints that are there whole or not at all, for any transformers or TRL Trainer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_utils import align_special_tokens

from ..errors import of_the_machine
from ..files import sha256, sync, write_json
from ..optim import MoLFAdamW
from ..optim.modules import outside_adapter
from ..optim.sharding import is_sharded
from .callbacks import RoutingCallback
from .distributed import from_all, from_first
from .sharded import load_optimizer, load_renamed, load_weights, save_optimizer
from .verify import MANIFEST, SHARDED, UNFINISHED, as_saved, check_checkpoint, check_fits, checkpoints


class WholeCheckpoints:
    """Mixin for a Trainer: ``checkpoint-N`` exists only when everything in it is on the disk.

    The Trainer writes into ``output_dir/unfinished-checkpoint``. There a manifest with the size and SHA-256 of every
    file is added, all is flushed to the disk, and the folder gets its name ``checkpoint-N`` in one step of the file
    system; only then are older checkpoints removed. So whatever ends the process, and whenever, the Trainer's own
    ``resume_from_checkpoint=True`` finds a checkpoint that is whole, ``save_total_limit=1`` included.

    On a resume, a checkpoint that is damaged, of another model or of other experts is refused before any weight is
    loaded.

    With several processes each looks at its share of the files, and the first publishes and removes: ``output_dir`` has
    to be one folder for all of them. Of a model that FSDP2 shards, weights are whole and the optimizer's state sharded.

    Attributes:
        verified: A checkpoint that was compared with its manifest already, and is not read once more for that.

    Example:
        class MyTrainer(WholeCheckpoints, Trainer): ...
    """

    verified: str | None = None
    _staging = False
    _resumed: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        run_dir: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return os.path.join(run_dir, UNFINISHED) if self._staging else run_dir

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, if the model's checkpoints hold what it trains; called by the Trainer.

        Raises:
            ValueError: If MoLF trains what PEFT does not save.
        """
        this: Any = self
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        lost = outside_adapter(this.model) if isinstance(optimizer, MoLFAdamW) else []
        if lost and this.args.save_strategy != "no":
            raise ValueError(
                f"{lost[0]} is trained and is no part of the adapter ({len(lost)} such parameters), which is all that "
                "checkpoints of a PEFT model hold: train the model without an adapter, or with save_strategy='no' and "
                "merge_and_unload() before it is saved"
            )
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        this: Any = self  # the Trainer that this class is mixed into
        out = Path(this._get_output_dir(trial))
        final = out / f"checkpoint-{this.state.global_step}"
        staged = out / UNFINISHED / final.name
        if this.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        this.accelerator.wait_for_everyone()
        self._staging = True
        try:
            with writing(final):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                this._finish_current_push()  # an upload reads the staged folder
                if Path(this.state.best_model_checkpoint or "") == staged:
                    this.state.best_model_checkpoint = str(final)  # in every process, for all of them load it
                    if this.args.should_save:
                        this.state.save_to_json(str(staged / "trainer_state.json"))
                this.accelerator.wait_for_everyone()
                for callback in this.callback_handler.callbacks:
                    if isinstance(callback, RoutingCallback):
                        callback.sync()
                entries = from_all(look_at_files(staged, this.args.process_index, this.args.world_size))
                if this.args.should_save:
                    publish(staged, final, entries)
        finally:
            self._staging = False
            if this.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
        if this.args.should_save:
            rotate(final, this.args.save_total_limit, this.state.best_model_checkpoint)
        this.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        this: Any = self
        if resume_from_checkpoint != self.verified and (error := from_first(lambda: damage(resume_from_checkpoint))):
            raise error
        check_fits(Path(resume_from_checkpoint), this.model, this.optimizer_cls_and_kwargs)
        if (load := _loader(this.model)) is not None:
            load(this.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._resumed = resume_from_checkpoint

    def _load_callback_state(self) -> None:
        super()._load_callback_state()  # type: ignore[misc]
        self._find_best()  # right after the Trainer has loaded its state

    def _find_best(self) -> None:
        """Take the best checkpoint beside the resumed one: the path of then, which the Trainer goes by, may be gone."""
        this: Any = self
        if self._resumed is None:
            return
        best = TrainerState.load_from_json(os.path.join(self._resumed, "trainer_state.json")).best_model_checkpoint
        if best is not None and (found := Path(self._resumed).parent / Path(best).name).is_dir():
            this.state.best_model_checkpoint = str(found)

    def _finalize_training(self, *args: Any) -> Any:
        """The Trainer's, but the last checkpoint stays: until the result is saved there is nothing else of the end."""
        this: Any = self
        limit, this.args.save_total_limit = this.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)  # type: ignore[misc]
        finally:
            this.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        this: Any = self
        if (load := _loader(this.model)) is not None:
            load(this.model, Path(this.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        this: Any = self
        if not is_sharded(this.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        save_optimizer(this.model, this.optimizer.optimizer, Path(output_dir))
        if this.args.should_save:
            torch.save(this.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        this: Any = self
        if checkpoint is None or not (Path(checkpoint) / SHARDED).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        load_optimizer(this.model, this.optimizer.optimizer, Path(checkpoint))
        scheduler = torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True)
        this.lr_scheduler.load_state_dict(scheduler)

    def load_ended(self, checkpoint: str) -> None:
        """Take over weights and state of a checkpoint of the last step; ``train`` would make one step more."""
        this: Any = self
        align_special_tokens(this.model, this.processing_class)  # as ``train`` does
        this._load_from_checkpoint(checkpoint)
        this.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        self._find_best()
        if this.args.should_save:  # the run may have been killed before it did
            rotate(Path(checkpoint), this.args.save_total_limit, this.state.best_model_checkpoint)
        best = this.state.best_model_checkpoint
        if this.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            this._load_best_model()


def _loader(model: Any) -> Callable[[Any, Path], None] | None:
    """What reads a checkpoint's weights into the model; None if the Trainer can, as it can with PEFT's."""
    if isinstance(model, PeftModel):
        return None
    own = model.state_dict()
    if as_saved(model, own).keys() != own.keys():
        return load_renamed
    return load_weights if is_sharded(model) else None


def damage(checkpoint: str) -> ValueError | None:
    """What ``check_checkpoint`` has against a checkpoint, for all processes to raise."""
    try:
        check_checkpoint(Path(checkpoint))
    except ValueError as error:
        return error
    return None


def look_at_files(folder: Path, process: int, processes: int) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the files of a folder that are this process's share, when they are on the disk; by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())[process::processes]
    for path in files:
        sync(path)
    return {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}


def publish(staged: Path, final: Path, entries: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Give a folder that is complete its name; see ``WholeCheckpoints``.

    Args:
        staged: The folder, in one of its own.
        final: Its name; a folder that has it is replaced.
        entries: What ``look_at_files`` gave to every process.

    Raises:
        OSError: If the disk is full.
        ValueError: If a process has written to another folder.
    """
    listed = {name: entry for part in entries for name, entry in part.items()}
    if listed.keys() != {str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file()}:
        raise ValueError(f"{final}: not all files are there; output_dir has to be one folder for all of them")
    for path in (path for path in staged.rglob("*") if path.is_dir()):
        sync(path)
    write_json(staged / MANIFEST, {"files": listed})
    if final.exists():
        final.rename(staged.parent / "replaced")
    staged.rename(final)
    sync(final.parent)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond a limit, but never the newest, which is whole, nor the best.

    transformers' own goes by the time of change or, where that says nothing, by the step, and may then keep a damaged
    checkpoint of a later step in place of the newest.

    Args:
        newest: The checkpoint that was saved last.
        limit: How many to keep, or None for all.
        best: The Trainer's best checkpoint, if it has one.
    """
    kept = {path.resolve() for path in (newest, *([Path(best)] if best else [])) if path.is_dir()}
    others = [path for path in checkpoints(newest.parent) if path.resolve() not in kept]
    for path in others[: max(0, len(others) + len(kept) - limit)] if limit is not None and limit > 0 else ():
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """One clear error where a file or folder cannot be written; torch.save does not say that the disk is full.

    Raises:
        OSError: With the free space and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if of_the_machine(error):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"{path} cannot be written, with {free:.1f} MiB free on its disk ({' '.join(str(error).split())[:200]}): "
            "make room or give permission, and continue with --resume_from_checkpoint last; older checkpoints are whole"
        ) from error
