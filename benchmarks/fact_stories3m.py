"""The run in the README: stories3M learns 1,000 real CounterFact facts by four methods.

    python benchmarks/fact_stories3m.py        # writes benchmarks/results/fact_stories3m.json, then
    python benchmarks/tables.py                # rewrites the table in README.md

Every run is one ``molf train`` on one CPU thread in a process of its own. Learning rates were fixed beforehand, one
per method: this shows what the commands do, it is no comparison of methods. A run that is in the results file is not
run again, so an interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results" / "fact_stories3m.json"
COMMON = (
    "--task fact --max_examples 1000 --num_train_epochs 8 --per_device_train_batch_size 32 "
    "--gradient_checkpointing false --save_strategy no --logging_strategy epoch --use_cpu true --disable_tqdm true"
)
METHODS = {
    "fft": "--learning_rate 5e-4",
    "lora": "--learning_rate 1e-3 --expert_ranks 64",
    "molf": "--learning_rate 5e-4 --lora_lr 1e-3 --expert_ranks 64",
    "molf-e": "--learning_rate 1e-3 --expert_ranks 16 64",
}


def main() -> None:
    """Run what is missing and write the results after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "stories3M")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "counterfact" / "counterfact-train.json")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"common": COMMON, "runs": []}
    done = {(run["method"], run["seed"]) for run in results["runs"]}
    for seed in options.seeds:
        for method, arguments in METHODS.items():
            if (method, seed) in done:
                continue
            print(f"{method}, seed {seed}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                paths = ["--model_name_or_path", str(options.model), "--dataset_path", str(options.data)]
                command = [sys.executable, "-m", "molf", "train", "--method", method, *paths, *COMMON.split()]
                command += [*arguments.split(), "--seed", str(seed), "--output_dir", folder]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                metrics = json.loads((Path(folder) / "metrics.json").read_text())
                metrics = {key: value for key, value in metrics.items() if not key.endswith("_first")}  # not shown
                versions = json.loads((Path(folder) / "run.json").read_text())["versions"]
            run = {"method": method, "seed": seed, "arguments": arguments, "metrics": metrics, "versions": versions}
            results["runs"].append(run)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
