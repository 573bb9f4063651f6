"""Replays a recorded trajectory through the public API and compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from molf import MoLFConfig, create_molf_optimizer, molf_lora_config

Tensors = dict[str, torch.Tensor]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def load_case(folder: Path, name: str) -> tuple[dict[str, Any], Tensors]:
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


def build_model(spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    if spec["model"]["kind"] == "mlp":
        return MLP().to(dtype)
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    model = Qwen2ForCausalLM(Qwen2Config(**spec["model"]["config"], attn_implementation="sdpa")).to(dtype).train()
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = _norm_in_run_dtype.__get__(module)
    return model


def _norm_in_run_dtype(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def config_of(spec: dict[str, Any]) -> MoLFConfig:
    hyper = spec["hyper"]
    return MoLFConfig(
        expert_ranks=tuple(hyper["ranks"]),
        lora_alpha=tuple(hyper["alphas"]),
        use_rslora=hyper["use_rslora"],
        train_base=not hyper["efficient"],
        top_k=hyper["topk"],
        score_fn=hyper["score"],
        lr=hyper["lr_fft"],
        lora_lr=hyper["lr_lora"],
        weight_decay=hyper["weight_decay_fft"],
        lora_weight_decay=hyper["weight_decay_lora"],
        betas=tuple(hyper["betas"]),
        eps=hyper["adam_eps"],
        max_grad_norm=hyper["clip_grad_norm"],
    )


class Replay:
    """One case in one form of MoLF: "fused" (virtual experts) or "adapter" (a PEFT adapter)."""

    def __init__(self, spec: dict[str, Any], tensors: Tensors, form: str) -> None:
        self.spec, self.tensors = spec, tensors
        self.dtype = getattr(torch, spec["dtype"])
        self.config = config_of(spec)
        model = build_model(spec, self.dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors["init/" + _base_name(spec, name)])
        if form == "adapter":
            from peft import get_peft_model

            model = get_peft_model(model, molf_lora_config(self.config), autocast_adapter_dtype=False).to(self.dtype)
            self.prefix = "base_model.model."
        else:
            self.prefix = ""
        self.model = model
        self.optimizer = create_molf_optimizer(model, self.config)
        self._set_experts()

    def _set_experts(self) -> None:
        first = 0 if self.spec["hyper"]["efficient"] else 1
        scales = self.config.scales
        for module in self.spec["modules"]:
            names = [f"init/{module['name']}.expert_{k + first}" for k in range(len(scales))]
            pairs = [(self.tensors[f"{name}.A"], self.tensors[f"{name}.B"]) for name in names]
            A = torch.cat([pair[0] for pair in pairs]).to(self.dtype)
            layer = self.model.get_submodule(self.prefix + module["name"])
            with torch.no_grad():
                if self.prefix:
                    layer.lora_A["default"].weight.copy_(A)
                    folded = [pair[1].to(self.dtype) * s for s, pair in zip(scales, pairs, strict=True)]
                    layer.lora_B["default"].weight.copy_(torch.cat(folded, 1))
                else:
                    state = self.optimizer.state[layer.weight]
                    state["lora_A"].copy_(A)
                    state["lora_B"].copy_(torch.cat([pair[1].to(self.dtype) for pair in pairs], 1))
        self.optimizer.sync_weights()

    def loss(self, rows: slice, batch: int) -> torch.Tensor:
        if self.spec["model"]["kind"] == "mlp":
            x, y = (self.tensors[f"data/{key}"][batch][rows].to(self.dtype) for key in ("inputs", "targets"))
            return ((self.model(x) - y) ** 2).mean()
        tokens = self.tensors["data/tokens"][batch][rows].long()
        logits = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    def run(self) -> dict[str, list[Any]]:
        """All steps; returns losses, and winners and scores per module and step."""
        hyper, factors = self.spec["hyper"], self.tensors["lr_factor"].tolist()
        scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: factors[min(t, len(factors) - 1)])
        seen: dict[str, list[Any]] = {"loss": []}
        micro = hyper["micro_batches_per_step"]
        for t in range(hyper["steps"]):
            batch, total = int(self.tensors["data/batch_index"][t]), 0.0
            size = len(self.tensors["data/inputs" if self.spec["model"]["kind"] == "mlp" else "data/tokens"][batch])
            for part in range(micro):
                loss = self.loss(slice(part * size // micro, (part + 1) * size // micro), batch) / micro
                loss.backward()
                total += loss.item()
            self.optimizer.step()
            self.optimizer.zero_grad()
            scheduler.step()
            seen["loss"].append(total)
            for name, routing in self.optimizer.routing.items():
                key = name.removeprefix(self.prefix)
                indices = [routing.experts.index(winner) for winner in routing.winners]
                seen.setdefault(f"winner/{key}", []).append(indices)
                seen.setdefault(f"score/{key}", []).append(list(routing.scores))
        return seen

    def experts_of(self, name: str) -> Tensors:
        """W, b, A, B of a module in the recorded names."""
        layer = self.model.get_submodule(self.prefix + name)
        first = 0 if self.spec["hyper"]["efficient"] else 1
        base = layer.base_layer if self.prefix else layer
        state = self.optimizer.state.get(base.weight, {})
        if self.prefix:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            folds = self.config.scales
        else:
            A, B, folds = state["lora_A"], state["lora_B"], (1.0,) * len(self.config.scales)
        out = {f"{name}.W": state.get("base", base.weight)}
        if base.bias is not None:
            out[f"{name}.b"] = base.bias
        start = 0
        for k, (rank, fold) in enumerate(zip(self.config.expert_ranks, folds, strict=True)):
            out[f"{name}.expert_{k + first}.A"] = A[start : start + rank]
            out[f"{name}.expert_{k + first}.B"] = B[:, start : start + rank] / fold
            start += rank
        return {key: value.detach() for key, value in out.items()}

    def final(self) -> Tensors:
        """Every trained tensor in the recorded names."""
        result: Tensors = {}
        for module in self.spec["modules"]:
            result |= self.experts_of(module["name"])
        for entry in self.spec["standard_parameters"]:
            result[entry["name"]] = self.model.get_parameter(self.prefix + entry["name"]).detach()
        return result


def _base_name(spec: dict[str, Any], name: str) -> str:
    module, _, kind = name.rpartition(".")
    if any(entry["name"] == module for entry in spec["modules"]):
        return f"{module}.{'W' if kind == 'weight' else 'b'}"
    return name
