"""Does the export say what the trained model says? Logits on real prompts, and how far they may be apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from ..tasks import get_task
from ..tasks.prompts import Context
from ..train.load import load_model
from ..world import make_world, statement
from .run import TrainedRun, in_float32

PROMPTS, LENGTH = 16, 64
"""How many texts are compared, and how many tokens at the end of each, at most."""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on the same texts.

    Attributes:
        max_abs: Largest difference of a logit.
        kl: Mean over tokens of KL(trained ‖ export) of the next token, nats.
        max_logit: Largest magnitude of the trained model's logits.
        tokens: How many tokens were compared.
    """

    max_abs: float
    kl: float
    max_logit: float
    tokens: int

    def __str__(self) -> str:
        """One line, with units."""
        return (
            f"max |Δ logit| {self.max_abs:.3g} of {self.max_logit:.3g}, "
            f"KL {self.kl:.3g} nats per token over {self.tokens} tokens"
        )


def real_texts(run: TrainedRun) -> tuple[list[str], str]:
    """Texts of the run's data, prompt and completion, and what they are.

    Where the data cannot be read any more they are statements about the bundled world, and the description says why.
    """
    task, path, limit = run.method["task"] or "completion", run.method["dataset_path"], run.method["max_examples"]
    limit = min(limit or PROMPTS, PROMPTS)
    try:
        found = get_task(task)
        pairs = [found.example(record) for record in found.load(path, limit)]
    except (ValueError, OSError) as error:
        facts = make_world().facts[:PROMPTS]
        reason = " ".join(str(error).split())
        return ["".join(statement(fact, 0)) for fact in facts], f"statements of the bundled world, because {reason}"
    return [pair["prompt"] + pair["completion"] for pair in pairs], f"the run's data: {task}, {path or 'own'}"


def tokens_of(texts: Sequence[str], model: Any, tokenizer: Any) -> list[Tensor]:
    """Token ids (1, n) of every text: BOS where the tokenizer adds one, and the end that the model takes."""
    context = Context.of(model, tokenizer)
    context.shorten(LENGTH)
    return [torch.tensor([context.fit(tokenizer(text).input_ids, 0)]) for text in texts]


@torch.no_grad()
def logits_of(model: Any, batch: Sequence[Tensor]) -> list[Tensor]:
    """Logits (n, vocabulary) of every text, in float32."""
    return [model(input_ids=ids).logits[0].float() for ids in batch]


def difference(reference: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """How far ``found`` is from ``reference``; not a number where a logit is none."""
    deltas, divergences = [], []
    for one, other in zip(reference, found, strict=True):
        p, q = log_softmax(one.double(), -1), log_softmax(other.double(), -1)
        deltas.append((one - other).abs().max())
        divergences.append(kl_div(q, p, log_target=True, reduction="sum"))
    tokens = sum(map(len, reference))
    return Difference(
        max_abs=torch.stack(deltas).max().item(),
        kl=torch.stack(divergences).sum().item() / tokens,
        max_logit=max(one.abs().max().item() for one in reference),
        tokens=tokens,
    )


def rounding_tolerance(model: Any, dtype: torch.dtype, logits: Sequence[Tensor]) -> float:
    """The largest difference of a logit that storing the weights in ``dtype`` explains.

    Rounding changes a weight by at most u, relatively: 2⁻²⁴ for float32, 2⁻¹¹ for float16, 2⁻⁸ for bfloat16. So each of
    the model's D matrices adds noise of at most u to what passes through it, and float32 sums of n terms add √n 2⁻²⁴.
    The noises are independent and grow as √D. The factor 8 stands for the largest of many logits, some five standard
    deviations, and for what norms and attention amplify:

        8 √D (u + √n 2⁻²⁴) rms(logits)

    Args:
        model: The trained model.
        dtype: Of the exported weights.
        logits: What it says to the texts that are compared.
    """
    shapes = [p.shape for name, p in model.named_parameters() if p.dim() >= 2 and ".lora_" not in name]
    noise = torch.finfo(dtype).eps / 2 + math.sqrt(max(max(shape) for shape in shapes)) * 2.0**-24
    rms = torch.cat(list(logits)).square().mean().sqrt().item()
    return 8 * math.sqrt(len(shapes)) * noise * rms


def reload(run: TrainedRun, folder: Path, experts: Sequence[str] = ()) -> Any:
    """The export as its user loads it: AutoModelForCausalLM or AutoPeftModelForCausalLM, then in float32.

    Args:
        run: The run, for the precision and quantisation of the base that an adapter is loaded on.
        folder: The export.
        experts: Its subfolders where it is one adapter per expert; all of them are active together.

    Raises:
        ValueError: If it lacks a tensor.
        OSError: If it cannot be read.
    """
    hub: dict[str, Any] = {"trust_remote_code": run.trust_remote_code}
    first = folder / experts[0] if experts else folder
    if not (first / "adapter_config.json").is_file():
        return load_model(str(folder), "float32", **hub).eval()
    hub |= {"dtype": run.method["dtype"], "use_safetensors": True, **run.quantized}
    model = AutoPeftModelForCausalLM.from_pretrained(first, **hub)
    for name in experts[1:]:
        model.load_adapter(str(folder / name), adapter_name=name)
    if experts:
        model.base_model.set_adapter(["default", *experts[1:]])
    return in_float32(model)[0]
