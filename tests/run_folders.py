"""Small run directories as ``molf train`` leaves them, made without training, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = tuple(f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.up_proj"))
EXPERTS = ("dense", "lora_r4")


def routing_lines(
    steps: int, modules: Sequence[str] = MODULES, experts: Sequence[str] = EXPERTS
) -> list[dict[str, Any]]:
    """Header and records; module m takes the last expert from step 2m + 2 on and the first before."""
    lines: list[dict[str, Any]] = [{"schema": 1, "modules": list(modules), "experts": list(experts)}]
    for step in range(1, steps + 1):
        late = [step >= 2 * m + 2 for m in range(len(modules))]
        order = list(range(len(experts)))
        winners = [[order[-1] if is_late else 0] for is_late in late]
        scores = [[3e-9 if e == best[0] else 1e-9 for e in order] for best in winners]
        lines.append({"step": step, "lr": dict.fromkeys(experts, 1e-3), "scores": scores, "winners": winners})
    return lines


def write_run(
    folder: Path,
    method: str = "molf",
    steps: int = 20,
    *,
    routing: list[dict[str, Any]] | None = None,
    finished: bool = True,
    ranks: Sequence[int] = (4,),
    name: str = "model",
    evaluated: bool = False,
) -> Path:
    folder.mkdir(parents=True)
    molf = {"expert_ranks": list(ranks), "train_base": method in ("fft", "molf"), "lr": 1e-3, "lora_lr": 2e-3,
            "lora_alpha": None, "use_rslora": True, "policy": "score", "score_fn": "epd", "top_k": 1}  # fmt: skip
    config = {
        "method": {"method": method, "model_name_or_path": name, "task": "world-fact", "eval_examples": 64},
        "molf": molf,
        "training": {"learning_rate": 1e-3, "output_dir": str(folder)},
        "versions": {"torch": "2.13.0", "device": "cpu"},
    }
    (folder / "run.json").write_text(json.dumps(config))
    if routing is not None:
        (folder / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in routing))
    history: list[dict[str, Any]] = [
        {"step": step, "loss": 4.0 / step, "seconds": 0.5 * step, "num_tokens": 100 * step, "tokens_per_second": 200.0}
        for step in range(1, steps + 1)
    ]
    if evaluated:  # every fifth step, after that step's entry, as the Trainer does
        for step in range(5, steps + 1, 5):
            entry = {"step": step, "eval_loss": 5.0 / step, "eval_score": 80.0 - 100 / step, "seconds": 0.5 * step}
            history.append(entry)
        history.sort(key=lambda entry: entry["step"])
    place = folder if finished else folder / "checkpoint-10"
    place.mkdir(exist_ok=True)
    (place / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    if finished:
        metrics = {"method": method, "train_loss": 0.7, "steps": steps, "seconds": 0.5 * steps, "peak_memory_mib": 80.0,
                   "score": 81.25}  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
