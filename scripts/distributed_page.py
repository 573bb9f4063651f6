"""Write the calculated table of docs/distributed.md: memory and communication of a GPU, by the page's formulas.

python scripts/distributed_page.py            # rewrite
python scripts/distributed_page.py --check    # exit status 1 if the page is not what the formulas say

Shapes are the published configurations, counted on meta tensors; nothing is measured here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
BEGIN, END = "<!-- begin: calculated -->\n", "<!-- end: calculated -->"
RANK, EXPERTS, GPUS = 128, 2, (8, 64, 512)
MODELS = {
    "Qwen2.5-1.5B": transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": transformers.Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Llama-3.1-70B": transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """Elements of a model: all of them, of routed weights, and the routed layers' inputs and outputs in sum."""

    parameters: int
    routed: int
    modules: int
    inputs: int
    outputs: int
    tensors: int

    @classmethod
    def of(cls, config: transformers.PretrainedConfig) -> Counts:
        """Counted on the meta device."""
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        return cls(
            sum(p.numel() for p in model.parameters()),
            sum(m.weight.numel() for m in linear),
            len(linear),
            sum(m.in_features for m in linear),
            sum(m.out_features for m in linear),
            len(list(model.parameters())),
        )

    def full_memory(self, gpus: int) -> float:
        """Bytes of fp32 weights, gradients and two moments on a GPU."""
        return 16 * self.parameters / gpus

    def molf_memory(self, gpus: int) -> float:
        """Also W beside P, B with moments, and A with moments on every GPU."""
        return self.full_memory(gpus) + (4 * self.routed + 12 * RANK * self.outputs) / gpus + 12 * RANK * self.inputs

    def full_traffic(self, gpus: int) -> float:
        """Bytes that a GPU sends in a step: two all-gathers of bf16 weights, one reduce-scatter of fp32 gradients."""
        return (2 * 2 + 4) * self.parameters * (gpus - 1) / gpus

    def molf_traffic(self, gpus: int) -> float:
        """Bytes that MoLF's two all-reduces add, as rings: each sends 2 (n-1) / n of what it reduces."""
        numbers = RANK * self.inputs + self.tensors + EXPERTS * self.modules
        return 4 * numbers * 2 * (gpus - 1) / gpus


def table() -> str:
    """Rows by model and number of GPUs."""
    heads = ["model", "GPUs", "GiB per GPU: full fine-tuning", f"MoLF, r {RANK}", "of it A and its moments"]
    heads += ["GB sent per GPU and step: FSDP2", "MoLF adds"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    for name, config in MODELS.items():
        counts = Counts.of(config)
        for gpus in GPUS:
            memory = [counts.full_memory(gpus), counts.molf_memory(gpus), 12 * RANK * counts.inputs]
            traffic = [counts.full_traffic(gpus), counts.molf_traffic(gpus)]
            cells = [f"{each / 2**30:.2f}" for each in memory] + [f"{each / 1e9:.2f}" for each in traffic]
            lines.append(f"| {name} | {gpus} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its table made again."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table()}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Rewrite or check."""
    text = PAGE.read_text()
    made = page(text)
    if "--check" in sys.argv[1:]:
        return int(made != text)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
