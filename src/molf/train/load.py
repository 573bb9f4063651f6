"""Models and tokenizers from folders and the hub, and the versions that decide the numbers.

Weights are read from safetensors alone, and code of a model's own runs only where it is asked for.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from ..errors import of_the_machine
from ..optim.modules import keep_differentiable

_PACKAGES = ("molf", "torch", "transformers", "peft", "trl", "accelerate", "datasets")

_NO_PICKLES = (
    "Weights are read from safetensors alone, because a pickle can run code: where you trust it, load the model with "
    "transformers or PEFT and write it again with save_pretrained"
)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say which model it was and, of one that is nowhere, where it was looked for; the hub's client speaks of repo ids.

    Raises:
        ValueError: In place of a ValueError or OSError, with the name in front.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"model {name} cannot be read: {_reason(name, error)}") from error


def _reason(name: str, error: BaseException) -> str:
    if os.path.exists(name):
        return str(error)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return "there is no such folder, and no model of the hub has such a name"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return str(error)
    offline = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
    return f"there is no such folder, the hub cannot be reached{offline}, and its cache does not have the model"


def check_revision(name: str, revision: str) -> None:
    """Refuse a revision of a folder, which would be ignored.

    Raises:
        ValueError: Naming it.
    """
    if revision != "main" and os.path.isdir(name):
        raise ValueError(f"model_revision={revision}: {name} is a folder, which has no revisions; leave it out")


def load_tokenizer(name: str, eos_token: str | None = None, **hub: Any) -> Any:
    """The tokenizer of a folder or hub id, maybe with another end token.

    Raises:
        ValueError: If ``eos_token`` is not in its vocabulary.
        OSError: If there is no such tokenizer.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={eos_token!r} is not in the vocabulary of {name}: choose a token that is")
        tokenizer.eos_token = eos_token
    return tokenizer


def load_model(name: str, dtype: str, **hub: Any) -> Any:
    """The causal language model of a folder or hub id.

    Raises:
        ValueError: If its weights are damaged, or some are missing and would be random numbers, or it needs a package
            that is not there, as quantised models do.
        OSError: If there is no such model, or not in safetensors.
    """
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **hub
        )
    except OSError as error:
        raise OSError(f"{error} {_NO_PICKLES}" if "safetensors" in str(error) else str(error)) from error
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: shapes that are not the configuration's
        if of_the_machine(error):
            raise
        raise _damaged(name, error) from error
    except ImportError as error:
        raise ValueError(str(error)) from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"the weights of {name} lack {len(missing)} of the model's tensors, such as {missing[0]}")
    keep_differentiable(model)
    return model


def hub_commit(name: str, revision: str) -> str | None:
    """The commit that a revision of a hub id stands for now; None for a folder.

    Raises:
        OSError: If there is no such model.
    """
    commit: str | None = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    return commit


def load_trained(
    name: str, dtype: str, eos_token: str | None = None, quantized: Mapping[str, Any] | None = None, **hub: Any
) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub id that holds a whole model or a PEFT adapter.

    An adapter's base is the one that its configuration names, loaded with ``quantized``; its tokenizer is in its own
    folder, else the base's.

    Raises:
        ValueError: If weights are damaged or missing, or ``eos_token`` is not in the vocabulary.
        OSError: If model, adapter or base cannot be read, or not in safetensors.
    """
    if find_adapter_config_file(name, revision=hub.get("revision")) is None:
        return load_model(name, dtype, **hub), load_tokenizer(name, eos_token, **hub)
    try:  # PEFT would take a pickle instead
        cached_file(name, "adapter_model.safetensors", revision=hub.get("revision"))
    except OSError as error:
        raise OSError(f"{error} {_NO_PICKLES}") from error
    try:
        base = PeftConfig.from_pretrained(name, revision=hub.get("revision"))
    except (KeyError, TypeError) as error:  # another method, or fields that it does not have
        raise ValueError(f"its adapter_config.json is not PEFT's: {error}") from error
    if not base.base_model_name_or_path:
        raise ValueError("its adapter_config.json names no base model: set base_model_name_or_path")
    own = cached_file(
        name, "tokenizer_config.json", revision=hub.get("revision"), _raise_exceptions_for_missing_entries=False
    )
    source = hub if own else {**hub, "revision": base.revision}
    tokenizer = load_tokenizer(name if own else base.base_model_name_or_path, eos_token, **source)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys", category=UserWarning)
            options = {"dtype": dtype, "use_safetensors": True, **hub, **(quantized or {})}
            model = AutoPeftModelForCausalLM.from_pretrained(name, **options)
    except (SafetensorError, RuntimeError, UserWarning) as error:
        if of_the_machine(error):
            raise
        raise _damaged(name, error) from error
    keep_differentiable(model)
    return model, tokenizer


def _damaged(name: str, error: Exception) -> ValueError:
    first_words = " ".join(str(error).split())[:200]  # PEFT's go on about every tensor
    return ValueError(f"the weights of {name} are damaged, incomplete or of another shape: {first_words}")


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide the numbers and of ``more``, and the device."""
    found = {name: importlib.metadata.version(name) for name in (*_PACKAGES, *more)}
    found["torch"] = str(torch.__version__)  # with its build, which the metadata of PyPI's leave out
    threads = torch.get_num_threads()
    cpu = f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"python": platform.python_version(), "device": device, **found}
