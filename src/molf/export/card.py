"""The model card of an export: where it comes from, what it is, and how near it is to the trained model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..optim import read_routing
from ..optim.routing import expert_share
from ..train.methods import METHODS
from .run import TrainedRun

TITLES = {
    "merged": "a whole model",
    "adapter": "a PEFT adapter",
    "experts": "one PEFT adapter per expert",
    "delta": "a PEFT adapter, the dense change as a LoRA",
}


def routing_summary(run: TrainedRun) -> dict[str, dict[str, float]]:
    """Share of (step, layer) decisions that every expert won: over all layers, and by kind of layer; empty if none.

    Raises:
        ValueError: If the log is damaged; names it.
    """
    path = run.folder / "routing.jsonl"
    if not path.is_file():
        return {}
    header, records = read_routing(path)
    kinds: dict[str, list[int]] = defaultdict(list)
    try:
        for index, name in enumerate(header["modules"]):
            kinds[name.rpartition(".")[2]].append(index)
        rows = {"all layers": range(len(header["modules"])), **kinds}
        return {kind: _shares(records, indices, header["experts"]) for kind, indices in rows.items()}
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _shares(records: list[dict[str, Any]], indices: Sequence[int], experts: Sequence[str]) -> dict[str, float]:
    rows = [{"winners": [record["winners"][i] for i in indices]} for record in records]
    return {name: expert_share(rows, i) for i, name in enumerate(experts)}


def card(run: TrainedRun, report: Mapping[str, Any]) -> str:
    """README.md with the hub's metadata in front."""
    adapter = report["to"] != "merged"
    method = run.method
    meta = {
        "base_model": run.base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["molf", *(["lora"] if adapter else [])],
    }
    facts = {
        "base model": f"{run.base}, revision {run.revision}",
        "method": method["method"],
        "experts": _experts(run),
        "data": ", ".join(f"{key} {value}" for key, value in report["data"].items()),
        "weights": f"{report['dtype']}, trained in {method['dtype']} on a base quantised to {run.quantization}",
    }
    parts = [
        f"---\n{yaml.safe_dump(meta, sort_keys=False)}---",
        f"# {report['name']}: {TITLES[report['to']]}",
        "Made by `molf export` from a run of `molf train`.",
        _table(("", ""), list(facts.items())),
        "## Verified",
        _verified(report),
        *(["## Energy kept", _energy(report)] if "energy" in report else []),
        *(["## Routing", _routing(report["routing"])] if report["routing"] else []),
        "## Metrics of the run",
        _table(
            ("metric", "value"), [(k, _short(v)) for k, v in run.metrics.items() if isinstance(v, (int, float, str))]
        ),
        "## Versions",
        _table(
            ("package", "training", "export"),
            [(name, run.versions.get(name, "-"), version) for name, version in report["versions"].items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _experts(run: TrainedRun) -> str:
    """The experts with their ranks and scales; the ranks of a plain LoRA as well."""
    if not METHODS[run.method["method"]].routes and not run.has_adapter:
        return "none"
    first = 1 if run.config.train_base else 0
    scales = dict(zip(run.config.experts[first:], run.config.scales, strict=True))
    return ", ".join(f"{name} (scale {scales[name]:.4g})" if name in scales else name for name in run.config.experts)


def _verified(report: Mapping[str, Any]) -> str:
    found = report["difference"]
    lines = [
        "Loaded anew from this folder and compared with the trained model, both computed in float32, on "
        f"{report['prompts']} prompts of {report['source']} ({found['tokens']} tokens):",
        _table(
            ("", ""),
            [
                ("largest difference of a logit", f"{found['max_abs']:.3g}"),
                ("KL(trained, export), nats per token", f"{found['kl']:.3g}"),
                ("largest logit", f"{found['max_logit']:.3g}"),
                ("tolerance", report["tolerance_rule"]),
            ],
        ),
    ]
    if "base_difference" in report:
        lines.append(f"For comparison, KL(trained, base) is {report['base_difference']['kl']:.3g} nats per token.")
    return "\n\n".join(lines)


def _energy(report: Mapping[str, Any]) -> str:
    energy = report["energy"]
    rows = [(name, f"{100 * share:.2f} %") for name, share in energy["layers"].items()]
    return "\n\n".join(
        [
            f"Rank {report['rank']} keeps {100 * energy['total']:.2f} % of ‖ΔW‖_F² over all linear layers.",
            f"Carried whole: {', '.join(report['carried']) or 'nothing'}.",
            f"Left out: {', '.join(report['dropped']) or 'nothing'}.",
            _table(("layer", "kept"), rows),
        ]
    )


def _routing(summary: Mapping[str, Mapping[str, float]]) -> str:
    experts = list(next(iter(summary.values())))
    rows = [(kind, *(f"{100 * share:.1f} %" for share in shares.values())) for kind, shares in summary.items()]
    return "Share of updates that each expert won, over steps and layers.\n\n" + _table(("layers", *experts), rows)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
