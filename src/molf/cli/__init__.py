"""The command line. Each command is imported when it is called."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from ..errors import StoppedError, lost_process, out_of_memory
from ..optim import CompileError, NonFiniteError, ProcessesDifferError, ResumeError

COMMANDS = {
    "demo": "fine-tune the bundled model by every method and compare",
    "compare": "which method, at which learning rate, for your data",
    "report": "runs as one page: loss, routing, memory, configuration; or a LoraConfig from what was routed",
    "eval": "a task's metrics of any model or adapter",
    "export": "a run as a merged model or as adapters, verified",
    "plan": "tensors and memory of a training before it is run, by method and number of GPUs",
    "train": "fine-tune a model on your data by MoLF, full fine-tuning, LoRA and its kin, or a control",
    "bench": "time and memory of a step of each optimizer, side by side",
}

USAGE = "usage: molf COMMAND [options]\n\ncommands:\n" + "\n".join(
    f"  {name:8}{text}" for name, text in COMMANDS.items()
)


_SMALLER = (
    "Use a smaller per_device_train_batch_size with more gradient_accumulation_steps, a smaller "
    "per_device_eval_batch_size with eval_strategy, a smaller max_length, gradient_checkpointing, or a smaller "
    "model or batch_size"
)


_CONTINUE = (
    "Its own message, or the launcher's, says why; --resume_from_checkpoint auto continues from the last checkpoint"
)
_PATIENCE = 3.0
"""Seconds that other processes leave to the first one: it says what all of them know, and the launcher ends them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status: 0, 2 for an error that the user can mend, 130 interrupted, 143 by SIGTERM.

    Args:
        argv: Arguments without the program's name; None means the command line's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .. import __version__

        print(f"molf {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    if command != "train" and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _fail(f"molf {command} is one process: start it without torchrun or accelerate launch")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use to the hub; here nothing phones home
    try:
        import_module(f".{command}", __name__).run(rest)
    except ModuleNotFoundError as error:
        return _fail(f"{error}: pip install 'molf[{'report' if command == 'report' else 'train'}]'")
    except (ValueError, OSError, ImportError, CompileError, NonFiniteError, ProcessesDifferError, ResumeError) as error:
        return _fail(str(error) or type(error).__name__)
    except (MemoryError, RuntimeError) as error:
        if lost_process(error):
            reason = str(error).rpartition("] ")[2].split(". ")[0]  # after gloo's place in the code, before its advice
            return _fail(f"another process of this run has ended ({reason}). {_CONTINUE}")
        if not out_of_memory(error):
            raise
        return _fail(f"out of memory: {str(error).strip() or type(error).__name__}. {_SMALLER}")
    except StoppedError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"molf: {error}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("molf: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    process = int(os.environ.get("RANK", "0"))
    if process > 0:
        time.sleep(_PATIENCE)
        message = f"process {process}: {message}"
    print(f"molf: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
