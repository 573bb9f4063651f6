"""One export from beginning to end: read the run, write the form, load it anew, compare, and put it in place."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..train.load import versions
from . import verify
from .card import card, routing_summary
from .delta import make_delta
from .folder import record, replacing
from .run import TrainedRun, read_run
from .verify import Difference, difference, logits_of, rounding_tolerance
from .weights import read_adapter, write_adapter, write_experts, write_merged

DATA = ("task", "dataset_path", "max_examples")
FORMS = ("merged", "adapter", "experts", "delta")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ExportOptions:
    """What to make of a run.

    Attributes:
        to: One of ``FORMS``.
        dtype: Precision of the weights, one of ``DTYPES``, or "auto": as the run has them.
        rank: Of the LoRA that stands for a dense change; ``delta`` alone.
        drop_other: Leave out what a LoRA cannot hold; ``delta`` alone.
        dequantize: Merge into the dequantised weights of a quantised base.
        tolerance: Largest difference of a logit from the trained model; None is derived.
        max_shard_size: Of one file of a merged model, as transformers takes it.
    """

    to: str
    dtype: str = "auto"
    rank: int | None = None
    drop_other: bool = False
    dequantize: bool = False
    tolerance: float | None = None
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class _Trained:
    """The trained model, as what an export is compared with.

    Attributes:
        model: In float32.
        dtype: The precision that its weights had.
        tokenizer: Its tokenizer.
        batch: Token ids of real texts.
        logits: What it says to them.
    """

    model: Any
    dtype: torch.dtype
    tokenizer: Any
    batch: list[Tensor]
    logits: list[Tensor]

    def tolerance(self, dtype: torch.dtype) -> float:
        """What rounding to ``dtype`` explains."""
        return rounding_tolerance(self.model, dtype, self.logits)

    def difference(self, other: Any) -> Difference:
        """How far another model is from it."""
        return difference(self.logits, logits_of(other, self.batch))


def export(
    folder: Path, target: Path, options: ExportOptions, *, base: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Export a run, verified; returns what was written, as in ``export.json``.

    Args:
        folder: The run directory.
        target: Where the export goes; an older export there is replaced in one step, and only if all went well.
        options: The form and its settings.
        base: Where the base model is now, if it has moved.
        trust_remote_code: Whether the base's own code may run.

    Raises:
        ValueError: If the run or the base cannot be read, the form does not fit the method, or the export differs from
            the trained model by more than the tolerance. The target is as it was then.
        OSError: If the target cannot be written.
    """
    run = read_run(folder, base, trust_remote_code)
    _check(run, options)
    with replacing(target) as stage:
        texts, source = verify.real_texts(run)
        trained = _load(run, texts)
        report = {
            "to": options.to,
            "name": target.name,
            "base": run.base,
            "revision": run.revision,
            "method": run.method["method"],
            "experts": list(run.config.experts),
            "scales": list(run.config.scales),
            "prompts": len(texts),
            "source": source,
            "data": {key: run.method[key] for key in DATA if run.method[key] is not None},
            "routing": routing_summary(run),
            "metrics": run.metrics,
            "versions": versions(),
            **(_delta if options.to == "delta" else _lossless)(run, trained, stage, options),
        }
        trained.tokenizer.save_pretrained(stage)
        (stage / "README.md").write_text(card(run, report))
        record(stage, report)
    return report


def _load(run: TrainedRun, texts: list[str]) -> _Trained:
    tokenizer = run.load_tokenizer()
    model, dtype = run.load_trained()
    batch = verify.tokens_of(texts, model, tokenizer)
    return _Trained(model, dtype, tokenizer, batch, logits_of(model, batch))


def _check(run: TrainedRun, options: ExportOptions) -> None:
    """Whether the form fits the run and the settings fit the form."""
    method, to = run.method["method"], options.to
    if to in ("adapter", "experts") and not run.has_adapter:
        raise ValueError(
            f"--to {to}: {method} trained a whole model, no adapter; use --to merged, or --to delta --rank R"
        )
    if to == "experts" and method != "molf-e":
        raise ValueError(f"--to experts: {method} has one adapter without experts; use --to adapter")
    if to == "delta" and run.has_adapter:
        raise ValueError(f"--to delta: {method} trained an adapter already; use --to adapter")
    if to == "delta" and options.rank is None:
        raise ValueError("--to delta needs --rank: the rank of the adapter, such as 64")
    for name, value in (("rank", options.rank), ("drop_other", options.drop_other)):
        if to != "delta" and value:
            raise ValueError(f"{name}={value}: --to {to} does not use it; leave it out or choose --to delta")
    if to == "merged" and run.quantization != "none" and not options.dequantize:
        raise ValueError(
            f"the run was trained on a base quantised to {run.quantization}; a merged model would not be: use --to "
            "adapter to serve it on that base, or --dequantize to merge into the weights that it was trained on"
        )
    if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", options.max_shard_size, re.IGNORECASE):
        raise ValueError(f"max_shard_size={options.max_shard_size}: give a number with KB, MB, GB or TB, such as 5GB")
    if options.dequantize and (to != "merged" or run.quantization == "none"):
        raise ValueError("dequantize: only --to merged of a run on a quantised base uses it; leave it out")


def _lossless(run: TrainedRun, trained: _Trained, stage: Path, options: ExportOptions) -> dict[str, Any]:
    """Write one of the forms that lose nothing but a rounding, and compare it with the trained model."""
    experts: list[str] = []
    dtype = DTYPES.get(options.dtype)
    exact, untrained = trained.tolerance(torch.float32), None
    if run.has_adapter:  # looked at before a merge takes the adapter away
        with trained.model.disable_adapter():
            untrained = trained.difference(trained.model)
    if options.to == "merged":
        written = dtype or trained.dtype
        limit = trained.tolerance(written)
        write_merged(run, trained.model, trained.tokenizer, stage, written, options.max_shard_size)
    else:
        config, tensors = read_adapter(run, dtype)
        written = next(iter(tensors.values())).dtype
        limit = trained.tolerance(written)
        if options.to == "experts":
            experts = write_experts(run, stage, written)
        else:
            write_adapter(config, tensors, stage)
    rule = f"{limit:.3g}, what rounding to {_name(written)} explains"
    if options.tolerance is not None:
        limit, rule = options.tolerance, f"{options.tolerance:.3g}, as asked for"
    found = trained.difference(verify.reload(run, stage, experts))
    _accept(found, limit, "the trained model")
    if untrained is not None and options.tolerance is None and found.max_abs > exact:
        _nearer(found, untrained, "a higher precision with --dtype")  # a coarse tolerance may hide that nothing is left
    return {
        "dtype": _name(written),
        "folders": experts,
        "difference": asdict(found),
        "tolerance": limit,
        "tolerance_rule": rule,
    }


def _delta(run: TrainedRun, trained: _Trained, stage: Path, options: ExportOptions) -> dict[str, Any]:
    """Write the dense change at a rank, and look at it twice: is the file right, and how much does the rank lose?"""
    rank = int(options.rank or 0)
    written = DTYPES.get(options.dtype) or trained.dtype
    base, _ = run.load_base()
    untrained = trained.difference(base)
    delta = make_delta(run, base, trained.model, rank, options.drop_other)
    intended = logits_of(delta.model, trained.batch)
    delta.model.to(written).save_pretrained(stage, save_embedding_layers=False)
    served = logits_of(verify.reload(run, stage), trained.batch)
    _accept(difference(intended, served), trained.tolerance(written), f"the model of rank {rank} that it was made from")
    found = difference(trained.logits, served)
    rule = "none at a low rank, but nearer to the trained model than the base is"
    if options.tolerance is not None:
        rule = f"{options.tolerance:.3g}, as asked for"
        _accept(found, options.tolerance, "the trained model")
    else:
        _nearer(found, untrained, "a higher --rank, or --to merged")
    return {
        "dtype": _name(written),
        "rank": rank,
        "energy": {"total": delta.total, "layers": delta.energy},
        "carried": delta.carried,
        "dropped": delta.dropped,
        "difference": asdict(found),
        "base_difference": asdict(untrained),
        "tolerance": options.tolerance,
        "tolerance_rule": rule,
    }


def _accept(found: Difference, limit: float, what: str) -> None:
    if not found.max_abs <= limit:  # nor if it is not a number
        raise ValueError(
            f"the export differs from {what}: {found}; the tolerance is {limit:.3g}. Nothing was written: choose a "
            "higher precision with --dtype, or a --tolerance that you can live with"
        )


def _nearer(found: Difference, untrained: Difference, remedy: str) -> None:
    """Refuse an export that says less of what was learned than the base does."""
    if not found.kl < untrained.kl:
        raise ValueError(
            f"the export is no nearer to the trained model than the base is (KL {found.kl:.3g} against "
            f"{untrained.kl:.3g} nats per token): choose {remedy}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
