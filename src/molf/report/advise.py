"""From a routing log to a recommendation for plain PEFT: what to train in full, and what by LoRA of which rank."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..optim import MoLFConfig
from .runs import RoutingLog, Run
from .statistics import margins, specialised, window_medians

_CONTESTED = 0.6
_WHAT_IT_IS_NOT = """\
# What this is not: a measurement of this configuration. The router compared the decrease of the loss per parameter that
# each expert's next step promised, while all experts were in the forward pass and trained beside each other. It says
# where the updates went in this run, with its data, learning rates and ranks. It does not say that LoRA alone, at
# another learning rate, would do worse, nor that a rank which was not an expert would not do better; and a winner that
# was kept from the first steps on may owe that to the start. Train it, and compare."""


@dataclass(frozen=True)
class Verdict:
    """What one module wanted.

    Attributes:
        module: Its name in the model, without PEFT's prefix.
        expert: The dense expert if it won more than half of its steps, else the LoRA expert that won most of them.
        evidence: Share, steps, settling and margin, in a line.
    """

    module: str
    expert: str
    evidence: str


def advise(run: Run) -> str:
    """Python code that makes a ``LoraConfig``, with the evidence per module and what it is not.

    A module whose dense expert won more than half of its steps goes to ``modules_to_save``, PEFT's full training of a
    module; any other to ``target_modules``, with the rank and the scale of the LoRA expert that won most of its steps.

    Raises:
        ValueError: If the run has no routing, had no choice, or its winners were not chosen by the score.
    """
    log = run.routing
    if log is None or not len(log.steps):
        raise ValueError(f"{run.folder} has no routing: only a run of a method that routes can be advised from")
    if len(log.experts) < 2:
        raise ValueError(f"{run.folder} had the one expert {log.experts[0]}: nothing was chosen")
    if not run.config["molf"]:
        raise ValueError(f"{run.folder} has no run.json with ranks and scales: only a molf train can be advised from")
    try:
        config = MoLFConfig(**run.config["molf"])
    except (TypeError, ValueError) as error:  # a setting that this version does not know may change what others mean
        raise ValueError(f"{run.folder / 'run.json'} is damaged or of another version of molf: {error}") from error
    if config.experts != log.experts:
        raise ValueError(f"{run.folder} has a routing log of other experts than its run.json: {', '.join(log.experts)}")
    if config.policy != "score":
        raise ValueError(f"{run.folder} had policy={config.policy}: its winners were not chosen by the score")
    if config.top_k >= len(log.experts):
        raise ValueError(f"{run.folder} had top_k={config.top_k}: every expert won every step")
    verdicts = judge(log)
    dense = [verdict for verdict in verdicts if verdict.expert == "dense"]
    lora = [verdict for verdict in verdicts if verdict.expert != "dense"]
    head = [
        f"# From {len(log.steps):,} steps of {run.config['method'].get('method')!r} in {run.name!r}, with the experts "
        f"{', '.join(log.experts)}:",
        f"# {len(dense)} of {len(verdicts)} modules wanted dense updates, {len(lora)} LoRA. A module is put where most "
        "of its steps went, LoRA's experts counted together.",
        _WHAT_IT_IS_NOT,
    ]
    return "\n".join([*head, *_code(lora, dense, config)]) + "\n"


def judge(log: RoutingLog) -> list[Verdict]:
    """What every module wanted, in the log's order; a module that never took part is left out."""
    settled, margin = specialised(log.best, log.steps), margins(log.scores)
    verdicts = []
    for index, name in enumerate(log.modules):
        decisions = log.best[:, index][log.best[:, index] >= 0]
        if not len(decisions):
            continue
        wins = np.bincount(decisions, minlength=len(log.experts))
        dense = log.experts[0] == "dense" and 2 * wins[0] > len(decisions)  # of equal ones LoRA, the cheaper
        most = 0 if dense else max(range(len(log.experts)), key=lambda e: (log.experts[e] != "dense", wins[e]))
        last, share = decisions[-1], wins[most] / len(decisions)
        clear = float(window_medians(margin[:, index], np.array([0, len(log.steps)]))[0])
        lora = 1 - wins[0] / len(decisions) if log.experts[0] == "dense" and not dense else share
        together = f", LoRA {100 * lora:.0f} % in all" if lora > share else ""
        evidence = (
            f"{log.experts[most]} won {100 * share:.0f} % of {len(decisions):,} steps{together}, {log.experts[last]} "
            f"all from step {settled[index]:,}, median margin {clear:.2f}"
            + (", contested" if share < _CONTESTED or last != most else "")
        )
        verdicts.append(Verdict(name.removeprefix("base_model.model."), log.experts[most], evidence))
    return verdicts


def _code(lora: Sequence[Verdict], dense: Sequence[Verdict], config: MoLFConfig) -> list[str]:
    if not lora:
        lines = [f"#   {json.dumps(verdict.module)}: {verdict.evidence}" for verdict in dense]
        return ["# No module wanted LoRA: train in full, there is nothing to adapt.", *lines, "config = None"]
    experts = config.experts[int(config.train_base) :]
    ranks = dict(zip(experts, config.expert_ranks, strict=True))
    alphas = {e: s * ranks[e] ** 0.5 for e, s in zip(experts, config.scales, strict=True)}
    usual = Counter(verdict.expert for verdict in lora).most_common(1)[0][0]
    others = [
        verdict for verdict in lora if ranks[verdict.expert] != ranks[usual] or alphas[verdict.expert] != alphas[usual]
    ]
    lines = ["from peft import LoraConfig", "", "config = LoraConfig(", '    task_type="CAUSAL_LM",']
    lines.append(f"    r={ranks[usual]},")
    lines.append(f"    lora_alpha={alphas[usual]!r},  # scale alpha / sqrt(r) as the expert had it")
    lines.append("    use_rslora=True,")
    lines += _block("target_modules=[", [f"{json.dumps(v.module)},  # {v.evidence}" for v in lora], "],")
    if others:
        lines += _block("rank_pattern={", [f"{json.dumps(v.module)}: {ranks[v.expert]}," for v in others], "},")
        lines += _block("alpha_pattern={", [f"{json.dumps(v.module)}: {alphas[v.expert]!r}," for v in others], "},")
    if dense:
        lines += _block("modules_to_save=[", [f"{json.dumps(v.module)},  # {v.evidence}" for v in dense], "],")
    lines.append(")")
    if config.train_base:
        lines.append(f"# The run trained dense modules at lr {config.lr:g} and LoRA at {config.lora_lr:g}.")
    if config.trains_other:
        lines.append(
            "# It also trained what is not routed: embeddings and norms, which this configuration leaves frozen."
        )
    return lines


def _block(first: str, lines: Sequence[str], last: str) -> list[str]:
    return [f"    {first}", *(f"        {line}" for line in lines), f"    {last}"]
