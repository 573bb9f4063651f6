"""From which product of learning rate and scale does LoRA stop learning? The threshold of ``molf plan``'s warning.

python benchmarks/lr_scale.py STORIES3M      # writes benchmarks/results/lr_scale.json

128 facts of the bundled world, six epochs at batch 8, rank 16, seed 42, by LoRA and by MoLF (dense expert at 1e-3), on
the bundled model and on a stories3M folder; the training loss is averaged over every 12 steps.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from molf.assets import BUNDLED_MODEL
from molf.cli.train import parse
from molf.train.load import versions
from molf.train.run import train

RESULT = Path(__file__).parent / "results" / "lr_scale.json"
COMMON = (
    "--task world-fact --max_examples 128 --num_train_epochs 6 --expert_ranks 16 --use_cpu true --logging_steps 12 "
    "--gradient_checkpointing false --save_strategy no --disable_tqdm true --eval_at_end false"
).split()


def run(model: Path, method: str, scale: float, lora_lr: float) -> dict[str, Any]:
    """One training; returns its settings and losses."""
    rates = ["--learning_rate", str(lora_lr)]
    if method == "molf":
        rates = ["--learning_rate", "1e-3", "--lora_lr", str(lora_lr)]
    alpha = scale * (16 if method == "lora" else 4)  # lora divides by r, molf by its root
    eos = ["--eos_token", "</s>"] if model != BUNDLED_MODEL else []
    options = ["--model_name_or_path", str(model), "--method", method, "--lora_alpha", str(alpha), *rates, *eos]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        metrics = train(*parse([*COMMON, *options, "--output_dir", folder]))
        history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    losses = [round(entry["loss"], 3) for entry in history if "loss" in entry]
    found = {"model": model.name, "method": method, "scale": scale, "lora_lr": lora_lr, "losses": losses}
    return found | ({"dense_share": metrics["expert_share"]["dense"]} if method == "molf" else {})


def main() -> None:
    """All runs, in one process."""
    models = [BUNDLED_MODEL, Path(sys.argv[1])]
    runs = [
        run(model, method, scale, lora_lr)
        for model in models
        for method in ("lora", "molf")
        for scale in (2, 11.3)
        for lora_lr in (3e-3, 1e-2, 3e-2, 1e-1)
    ]
    RESULT.write_text(json.dumps({"versions": versions(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
