"""Pretrain the model that ships in ``src/molf/assets``: a tokenizer and a Qwen2 on the synthetic world.

    python scripts/pretrain_tiny.py --output_dir src/molf/assets/world-qwen2-1m

Trains a byte-level BPE tokenizer and a Qwen2-architecture model of about one million parameters on
the text of ``molf.world`` in under half an hour on one CPU core, then measures what it
knows and writes the model card. The run is a pure function of its seed and the library versions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from molf import world as w
from molf.tasks.scoring import score_continuations

END = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, like Qwen2's, over the pretraining text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=256, padding_side="right"
    )


class RowStream:
    """Rows of ``length`` tokens: whole texts, each closed by the end token, padded at the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.texts = w.pretraining_texts(w.make_world(), seed)
        self.pending: list[int] = []

    def rows(self, count: int) -> torch.Tensor:
        """The next ``count`` rows, (count, length) int64."""
        out = torch.full((count, self.length), self.tokenizer.pad_token_id)
        for row in out:
            ids = self.pending
            while len(ids) <= self.length:
                self.pending = [*self.tokenizer(next(self.texts)).input_ids, self.tokenizer.eos_token_id]
                if len(ids) + len(self.pending) > self.length:
                    break
                ids = ids + self.pending
            row[: len(ids)] = torch.tensor(ids[: self.length])
        return out


def labels_of(ids: torch.Tensor, pad: int) -> torch.Tensor:
    """The ids with padding masked out of the loss."""
    return ids.masked_fill(ids == pad, -100)


def greedy_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> float:
    """Share of (prompt, completion) pairs whose completion is what greedy decoding says."""
    return fmean(result.greedy for result in score_continuations(model, tokenizer, pairs, batch_size=256))


@torch.no_grad()
def mean_loss(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Cross-entropy in nats per token over ``texts``, each on its own."""
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        tokens = ids.shape[1] - 1
        total += float(model(input_ids=ids, labels=ids).loss) * tokens
        count += tokens
    return total / count


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, Any]:
    """What the model knows: greedy accuracies and the held-out loss."""
    model.eval()
    world = w.make_world()
    rng = random.Random(f"measure/{seed}")
    pairs = [(fact, k) for fact in world.facts for k in range(len(w.RELATIONS[fact.relation].statements))]
    trained = [w.statement(fact, k) for fact, k in pairs if not w.is_held_out(fact, k)]
    held_out = [w.statement(fact, k) for fact, k in pairs if w.is_held_out(fact, k)]
    choices = [w.multiple_choice_text(w.multiple_choice(world, fact, rng)) for fact in rng.sample(world.facts, 400)]
    sql = [w.sql_text(w.sql_question(world, rng)) for _ in range(200)]
    return {
        "facts": len(world.facts),
        "facts_known": greedy_accuracy(model, tokenizer, [w.statement(fact, 0) for fact in world.facts]),
        "trained_statements_known": greedy_accuracy(model, tokenizer, trained),
        "held_out_statements_known": greedy_accuracy(model, tokenizer, held_out),
        "questions_answered": greedy_accuracy(model, tokenizer, [w.question(fact) for fact in world.facts]),
        "multiple_choice_answered": greedy_accuracy(model, tokenizer, choices),
        "sql_exact": greedy_accuracy(model, tokenizer, sql),
        "held_out_loss_nats_per_token": mean_loss(model, tokenizer, [f"{p}{c}." for p, c in held_out]),
    }


def train(args: argparse.Namespace) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model; AdamW with warm-up and cosine decay."""
    tokenizer = train_tokenizer(
        list(islice(w.pretraining_texts(w.make_world(), seed=args.seed + 1), 20_000)), args.vocab_size
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model = Qwen2ForCausalLM(config)
    stream = RowStream(tokenizer, args.seed, args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    progress = tqdm(range(args.steps), desc="pretrain", unit="step")
    for step in progress:
        factor = min(step / 200, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        ids = stream.rows(args.batch)
        loss = model(input_ids=ids, labels=labels_of(ids, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model, tokenizer


CARD = """# {name}

A {parameters:,}-parameter Qwen2 (attention biases, tied embeddings, {layers} layers, hidden {hidden}, vocabulary
{vocab}) pretrained from scratch on the synthetic world of `molf.world` by `scripts/pretrain_tiny.py`. It ships with
`molf` so that the demo and the tests have a model that really knows something. It knows nothing about the real world.

| measured after training | |
|---|---|
| facts of the world | {facts} |
| facts completed correctly, first phrasing, greedy | {facts_known:.2%} |
| statements it was trained on, all phrasings, greedy | {trained_statements_known:.2%} |
| statements in a phrasing held out for that fact, greedy | {held_out_statements_known:.2%} |
| questions answered, greedy | {questions_answered:.2%} |
| four-way multiple choice | {multiple_choice_answered:.2%} |
| SQL, exact match | {sql_exact:.2%} |
| loss on held-out statements, nats per token | {held_out_loss_nats_per_token:.4f} |

What it can answer: completions such as `Ada Alder was born in`, `Question: ...\\nAnswer:`, four options `A.` to `D.`,
and SQL after a `CREATE TABLE` with rows, exactly in the wordings of `molf.world`; contexts up to 256 tokens.

Made in {minutes:.1f} minutes on {threads} CPU thread(s) with seed {seed}: {steps} steps of {batch} x {length} tokens;
Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}. The same figures are in
`training.json`.
Licence: that of the package.
"""


def main() -> None:
    """Train, measure, save the model, its figures and its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)
    start = time.perf_counter()
    model, tokenizer = train(args)
    minutes = (time.perf_counter() - start) / 60
    figures: dict[str, Any] = measure(model, tokenizer, args.seed)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    figures |= {key: getattr(args, key) for key in ("steps", "batch", "length", "seed", "threads")}
    figures |= {
        "minutes": minutes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    (args.output_dir / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    config = model.config
    (args.output_dir / "README.md").write_text(
        CARD.format(
            name=args.output_dir.name,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocab=config.vocab_size,
            **figures,
        )
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
