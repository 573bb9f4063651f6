"""What the low-memory options cost in the end, and how far a computed W drifts from a kept one.

    python benchmarks/low_memory.py            # writes benchmarks/results/low_memory.json, then
    python benchmarks/tables.py                # rewrites the tables in docs/performance.md

stories3M learns 500 real CounterFact facts by MoLF (r 64), 8 epochs, batch 32, warm-up 0.1 then cosine, in a plain loop
on one CPU thread; "drift" goes on for 1,000 steps with W kept and with W computed, on the same batches. A run that is
in the results file is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from molf import MoLFConfig, create_molf_optimizer
from molf.files import write_json
from molf.optim.quantized import is_quantized
from molf.optim.virtual import shares_storage
from molf.tasks import get_task
from molf.tasks.prompts import ended, tokenize_pairs
from molf.train.load import versions

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results" / "low_memory.json"
FACTS, EPOCHS, BATCH = 500, 8, 32
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, keep_base=False": (torch.float32, {"keep_base": False}),
    "fp32, moments_8bit=True": (torch.float32, {"moments_8bit": True}),
    "bf16": (torch.bfloat16, {}),
    "bf16, keep_base=False": (torch.bfloat16, {"keep_base": False}),
    "bf16, keep_base=False, moments_8bit=True": (torch.bfloat16, {"keep_base": False, "moments_8bit": True}),
}


class Run:
    """A model that learns the facts.

    Args:
        mode: A key of ``MODES``.
        seed: Of the experts and of the order of the data.
        steps: How many, for the schedule.
    """

    def __init__(self, mode: str, seed: int, steps: int) -> None:
        dtype, options = MODES[mode]
        torch.manual_seed(seed)
        folder = SHARED / "models" / "stories3M"
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = MoLFConfig(expert_ranks=(64,), lr=5e-4, lora_lr=1e-3, max_grad_norm=1.0, **options)
        self.optimizer = create_molf_optimizer(self.model, config)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, steps // 10, steps)
        self.step_seconds: list[float] = []
        self.dense_wins: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> float:
        """One training step; returns its loss in nats per token."""
        loss = self.model(**batch).loss
        loss.backward()
        start = time.process_time()
        self.optimizer.step()
        self.step_seconds.append(time.process_time() - start)
        self.optimizer.zero_grad()
        self.schedule.step()
        winners = [routing.winners[0] for routing in self.optimizer.routing.values()]
        self.dense_wins.append(winners.count("dense") / len(winners))
        return loss.item()

    def bytes_per_weight(self) -> float:
        """Bytes of a routed weight with its gradient, moments and master; experts are not counted."""
        total = numbers = 0
        for name in self.optimizer.routed_modules:
            weight = self.model.get_submodule(name).weight
            state = self.optimizer.state[weight]
            own = [state["exp_avg"], state["exp_avg_sq"]]
            own += [state["base"]] if "base" in state and not shares_storage(state["base"], weight) else []
            parts = [t for tensor in own for t in ((tensor.codes, tensor.scale) if is_quantized(tensor) else (tensor,))]
            total += 2 * weight.nbytes + sum(part.nbytes for part in parts)
            numbers += weight.numel()
        return total / numbers


def batches(records: list[Any], tokenizer: Any, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """Batches of prompt, completion and end, the loss on the completion alone, in an order that ``seed`` decides."""
    task, generator = get_task("fact"), torch.Generator().manual_seed(seed)
    examples = map(task.example, records)
    texts = [(example["prompt"], ended(tokenizer, example["completion"])) for example in examples]
    pairs = list(tokenize_pairs(tokenizer, texts))
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        chosen, order = [pairs[i] for i in order[:BATCH]], order[BATCH:]
        width = max(len(prompt) + len(completion) for prompt, completion in chosen)
        ids, labels, mask = (torch.full((BATCH, width), fill) for fill in (0, -100, 0))
        for row, (prompt, completion) in enumerate(chosen):
            end = len(prompt) + len(completion)
            ids[row, :end], mask[row, :end] = torch.tensor(prompt + completion), 1
            labels[row, len(prompt) : end] = torch.tensor(completion)
        yield {"input_ids": ids, "labels": labels, "attention_mask": mask}


def learn(mode: str, seed: int, records: list[Any]) -> dict[str, Any]:
    """One run of one mode: score, loss, bytes, milliseconds of CPU time per optimizer step."""
    steps = FACTS * EPOCHS // BATCH
    run = Run(mode, seed, steps)
    losses = [run.step(batch) for batch in batches(records, run.tokenizer, seed, steps)]
    metrics = get_task("fact").evaluate(run.model.eval(), run.tokenizer, records)
    return {
        "mode": mode,
        "seed": seed,
        "exact_match": metrics["exact_match"],
        "score": metrics["score"],
        "last_losses": sum(losses[-15:]) / 15,
        "bytes_per_weight": run.bytes_per_weight(),
        "step_ms": 1e3 * sorted(run.step_seconds)[steps // 2],
        "dense_wins": sum(run.dense_wins) / steps,
    }


def drift(records: list[Any], seed: int = 0, steps: int = 1000) -> list[dict[str, Any]]:
    """W kept against W computed, fp32, on the same batches: after every 100 steps how far P and the losses differ."""
    kept, computed = Run("fp32", seed, steps), Run("fp32, keep_base=False", seed, steps)
    rows, same, losses = [], [], []
    for n, batch in enumerate(batches(records, kept.tokenizer, seed, steps), 1):
        losses.append((kept.step(batch), computed.step(batch)))
        pairs = zip(kept.optimizer.routing.values(), computed.optimizer.routing.values(), strict=True)
        same += [a.winners == b.winners for a, b in pairs]
        if n % 100 == 0:
            weights = [
                (kept.model.get_submodule(name).weight, computed.model.get_submodule(name).weight)
                for name in kept.optimizer.routed_modules
            ]
            relative = [((a - b).norm() / a.norm()).item() for a, b in weights]
            recent = losses[-100:]
            rows.append(
                {
                    "steps": n,
                    "relative_difference": max(relative),
                    "same_winners": sum(same) / len(same),
                    "loss_kept": sum(a for a, _ in recent) / 100,
                    "loss_computed": sum(b for _, b in recent) / 100,
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run what is missing and write the results after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    records = get_task("fact").load(str(SHARED / "data" / "counterfact" / "counterfact-train.json"), FACTS)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": versions(), "runs": []}
    done = {(run["mode"], run["seed"]) for run in results["runs"]}
    for seed in seeds:
        for mode in MODES:
            if (mode, seed) not in done:
                results["runs"].append(learn(mode, seed, records))
                print(results["runs"][-1], flush=True)
                write_json(RESULTS, results)
    if "drift" not in results:
        results["drift"] = drift(records)
        write_json(RESULTS, results)


if __name__ == "__main__":
    main()
