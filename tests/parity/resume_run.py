"""A run that saves in the middle, or continues from there: ``python resume_run.py FORM DTYPE FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from models import causal_lm, lm_step
from molf import MoLFConfig, RoutingRecorder, create_molf_optimizer, molf_lora_config

FORMS = ("fused", "fused-frozen-base", "superposed", "molf-e", "no-lora")
HALF, END = 6, 12


def build(form: str, dtype: str) -> tuple[Any, Any, Any]:
    config = MoLFConfig(
        expert_ranks=() if form == "no-lora" else (2, 2, 4),
        train_base=form not in ("molf-e", "fused-frozen-base"),
        lr=1e-3,
        lora_lr=2e-3,
        max_grad_norm=1.0,
        lora_dropout=0.1 if form in ("superposed", "molf-e") else 0.0,
        top_k=1 if form == "no-lora" else 2,
    )
    model = causal_lm("qwen2", getattr(torch, dtype))
    if form in ("superposed", "molf-e"):
        model = get_peft_model(model, molf_lora_config(config), autocast_adapter_dtype=False)
    model.train()
    optimizer = create_molf_optimizer(model, config)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(t / 3, 1) * 0.9**t)


def continue_to(end: int, start: int, run: tuple[Any, Any, Any], log: Path) -> dict[str, Any]:
    model, optimizer, scheduler = run
    recorder = RoutingRecorder(optimizer, log)
    for step in range(start, end):
        lm_step(model, optimizer, step)
        scheduler.step()
    recorder.close()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "rng": torch.get_rng_state(),
    }


def resume(form: str, dtype: str, folder: Path) -> None:
    torch.manual_seed(12345)  # another state than the saved one: everything must come from the file
    run = build(form, dtype)
    with torch.no_grad():
        for parameter in run[0].parameters():
            parameter.add_(1)
    saved = torch.load(folder / "half.pt", weights_only=True)
    for part, name in zip(run, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["rng"])
    torch.save(continue_to(END, HALF, run, folder / "routing.jsonl"), folder / "resumed.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for form in sys.argv[1].split(","):
        for dtype in sys.argv[2].split(","):
            resume(form, dtype, Path(sys.argv[3]) / f"{form}-{dtype}")
