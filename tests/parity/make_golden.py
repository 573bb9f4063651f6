"""Make the project's own golden trajectories with ``MoLFAdamWReference``: ``python tests/parity/make_golden.py``.

The files have the format that ``golden.py`` replays. Float64, one thread, seeds below; made again only if the
mathematics changes, which is what they are there to notice.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from golden import MLP, config_of
from safetensors.torch import save_file

from molf.optim.reference import MoLFAdamWReference, superpose

FOLDER = Path(__file__).parent / "golden"
STEPS, BATCHES, LAYERS = 16, 8, ("fc1", "fc2")
_BASE = {
    "steps": STEPS, "topk": 1, "score": "epd", "lr_fft": 1e-3, "lr_lora": 3e-3, "weight_decay_fft": 0.1,
    "weight_decay_lora": 0.01, "betas": [0.9, 0.999], "adam_eps": 1e-8, "use_rslora": True,
    "micro_batches_per_step": 1, "clip_grad_norm": None, "efficient": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "own_molf_r3": {"ranks": [3], "alphas": [1.0], "lr_lora": 6e-3},
    "own_molf_r2r2r5_k2_clip": {"ranks": [2, 2, 5], "alphas": [0.7, 0.9, 1.1], "topk": 2, "clip_grad_norm": 0.1},
    "own_molf_r3_pfn_plain_lora": {"ranks": [3], "alphas": [1.5], "score": "pfn", "use_rslora": False},
    "own_molfe_r1r4_accum2": {"ranks": [1, 4], "alphas": [0.5, 0.9], "efficient": True, "micro_batches_per_step": 2},
}


def make(name: str, change: dict[str, Any]) -> None:
    """Run one case and write NAME.json and NAME.safetensors."""
    spec: dict[str, Any] = {
        "case": name,
        "dtype": "float64",
        "made_with": {"reference": "molf.optim.reference.MoLFAdamWReference", "torch": torch.__version__, "seed": 7},
        "model": {"kind": "mlp"},
        "hyper": {**_BASE, **change},
        "modules": [{"name": layer} for layer in LAYERS],
        "standard_parameters": [],
    }
    torch.manual_seed(7)
    config, hyper = config_of(spec), spec["hyper"]
    model = MLP().double()
    layers = superpose(model, list(LAYERS), config)
    tensors = {
        "data/inputs": torch.randn(BATCHES, 8, 12, dtype=torch.float64),
        "data/targets": torch.randn(BATCHES, 8, 8, dtype=torch.float64),
        "data/batch_index": (torch.arange(STEPS) % BATCHES).int(),
        "lr_factor": torch.tensor(
            [t / 3 if t < 3 else 0.5 * (1 + math.cos(math.pi * (t - 3) / (STEPS - 3))) for t in range(STEPS)],
            dtype=torch.float64,
        ),
    }
    for layer in layers.values():
        for B in layer.B:
            torch.nn.init.normal_(B, std=0.05)
        for base in (layer.W, layer.b):
            if base is not None:
                base.requires_grad_(config.train_base)
    tensors |= {f"init/{key}": value.clone() for key, value in named(layers, config.train_base).items()}
    reference = MoLFAdamWReference(layers, config)
    seen: dict[str, list[Any]] = {"loss": [], **{f"{kind}/{n}": [] for kind in ("score", "winner") for n in LAYERS}}
    micro = hyper["micro_batches_per_step"]
    for t in range(STEPS):
        batch, total = int(tensors["data/batch_index"][t]), 0.0
        data = zip(tensors["data/inputs"][batch].chunk(micro), tensors["data/targets"][batch].chunk(micro), strict=True)
        for x, y in data:
            loss = ((model(x) - y) ** 2).mean() / micro
            loss.backward()
            total += loss.item()
        reference.lr_factor = tensors["lr_factor"][t].item()
        reference.step()
        model.zero_grad()
        seen["loss"].append(total)
        for layer_name in LAYERS:
            seen[f"score/{layer_name}"].append(reference.scores[layer_name])
            seen[f"winner/{layer_name}"].append(reference.winners[layer_name])
    for key, rows in seen.items():
        tensors[key] = torch.tensor(rows, dtype=torch.int32 if key.startswith("winner") else torch.float64)
    final = named(layers, config.train_base)
    tensors |= {f"param/step_{STEPS:04d}/{key}": v for key, v in final.items() if config.train_base or "expert" in key}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(spec, indent=1) + "\n")
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, FOLDER / f"{name}.safetensors")


def named(layers: dict[str, Any], train_base: bool) -> dict[str, torch.Tensor]:
    """W, b, A and B in the recorded names; the dense expert is number 0 where it exists."""
    first, out = int(train_base), {}
    for name, layer in layers.items():
        out[f"{name}.W"] = layer.W.detach()
        if layer.b is not None:
            out[f"{name}.b"] = layer.b.detach()
        for k, (A, B) in enumerate(zip(layer.A, layer.B, strict=True)):
            out[f"{name}.expert_{k + first}.A"], out[f"{name}.expert_{k + first}.B"] = A.detach(), B.detach()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, change in CASES.items():
        make(case, change)
