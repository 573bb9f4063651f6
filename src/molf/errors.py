"""What ends a run though no file and no option is wrong: failures of the machine, RuntimeErrors all, and a signal."""

from __future__ import annotations

import torch


class StoppedError(Exception):
    """SIGTERM has ended training before its last step, with a checkpoint to continue from."""


def lost_process(error: BaseException) -> bool:
    """Whether another process has ended: NCCL's errors have a class, gloo's have none."""
    return isinstance(error, torch.distributed.DistError) or "third_party/gloo" in str(error)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: the errors of an accelerator's have a class, those of the CPU's have none."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def of_the_machine(error: BaseException) -> bool:
    """Whether it is one of these; whoever explains a RuntimeError passes them on as they are."""
    return lost_process(error) or out_of_memory(error)
