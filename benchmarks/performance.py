"""The tables and the figure of docs/performance.md, from ``benchmarks/results/bench_*.json``.

``python benchmarks/tables.py`` writes them. A CPU result that is missing, whole or by a row, is an error; GPU results
that are not there are "not measured".
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import correlation, mean, median, stdev
from typing import Any

from molf.bench.results import ratio

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "performance.svg"
FORCED = ("molf", "molf-dense", "molf-dense-late", "molf-lora")
TRAINED = ("fft", *FORCED, "molf-superposed", "lora", "lora-2", "molf-e")
STEPPED = ("fft", "fft-foreach", "fft-8bit", *FORCED, "molf-superposed", "lora", "lora-2", "molf-e")
WEIGHED = ("fft", "fft-8bit", "molf", "molf-dense", "molf-lora", "molf-superposed", "lora", "lora-2", "molf-e")
ON_GPU = ("fft", "fft-amp", "molf", "molf-dense-late", "molf-lora", "lora", "molf-e")
LESS = ("molf:keep_base=False", "molf:moments_8bit=True")
SIZES = (1, 2, 3, 4)
GROWN = "molf-dense-late"
EXPERTS = tuple(f"molf-lora:expert_ranks=[{','.join([str(64 // n)] * n)}]" for n in (1, 2, 4, 8))
OTHER_CPUS = {"xeon": "Intel Xeon", "zen3": "AMD EPYC, Zen 3"}
GPU_SHAPES = {"1.5b": "Qwen2.5-1.5B", "3b": "Qwen2.5-3B"}

Result = dict[str, Any]


def load(name: str) -> Result:
    """A result file that must be there and whole."""
    path = RESULTS / f"bench_{name}.json"
    script = "benchmarks/bench_gpu.sh" if "gpu" in name else "benchmarks/bench_cpu.sh"
    if not path.exists():
        raise ValueError(f"{path.name} is missing: run {script}")
    data = json.loads(path.read_text())
    if not data["complete"]:
        raise ValueError(f"{path.name} is of a run that did not end: run {script} again")
    return data


def row(data: Result, label: str) -> Result:
    """A contender's entry; fails if it was not measured."""
    entry = data["contenders"].get(label)
    if entry is None or not (entry["summary"] or "error" in entry):
        raise ValueError(f"{data['environment']['command']} has no row {label}: measure it")
    return entry


def over(data: Result, label: str, peer: str, part: str = "total") -> float:
    """Median over rounds of a contender's time, or memory, over a peer's."""
    return ratio(row(data, label)["rounds"][part], row(data, peer)["rounds"]["total"])["median"]


def times(data: Result, label: str, peer: str, digits: int = 3, part: str = "total") -> str:
    """``over`` for a table; "-" where one of the two found no memory."""
    found = all(row(data, name)["summary"] for name in (label, peer))
    return f"{over(data, label, peer, part):.{digits}f}" if found else "-"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def where(data: Result) -> str:
    """One line on device, versions, rounds and load."""
    e, s = data["environment"], data["settings"]
    rounds = max(len(entry["rounds"].get("total", ())) for entry in data["contenders"].values())
    device = e["device"] if e["device"] != "cpu" else f"{e['cpu']}, {e['threads']} thread(s)"
    return (
        f"\n{device}, {s['dtype']}, batch {s['batch']} x {s['length']}, {rounds} round(s); torch {e['torch']}, "
        f"transformers {e['transformers']}, peft {e['peft']}; load {e['load_at_start'][0]} before, "
        f"{e['load_at_end'][0]} after; commit {e['commit']}."
    )


def bars() -> str:
    """What was aimed at, and what was measured."""
    train, four = load("train_cpu"), load("train_cpu_accumulation")
    dense, lora = _without_matmuls(load("step_cpu"))
    weight = memory_without_experts(load("memory_cpu"), "molf-dense")
    rows = [
        ("whole training step, MoLF / full fine-tuning with fused AdamW", 1.05, over(train, "molf", "fft")),
        ("the same, four accumulated batches", 1.02, over(four, "molf", "fft")),
        ("whole training step, MoLF-Efficient / PEFT LoRA of the same rank", 1.02, over(train, "molf-e", "lora")),
        ("optimizer step without its matmuls / fused AdamW's, dense wins everywhere (`molf-dense-late`)", 1.6, dense),
        ("the same, LoRA wins everywhere", 1.1, lora),
        ("peak memory without the experts / full fine-tuning's, LoRA never won", 1.05, weight),
        ("optimizer step of 28 layers of width 64 / fused AdamW's", 3, over(load("overhead_cpu"), "molf", "fft")),
        ("step time not linear in parameters, four sizes: 1 - r²", 0.01, 1 - growth_r2(GROWN)),
        ("1, 2, 4 or 8 experts of equal total rank, slowest / fastest", 1.05, experts_spread()),
    ]
    for machine, cpu in OTHER_CPUS.items():
        dense, lora = _without_matmuls(load(f"step_cpu_{machine}"))
        rows += [
            (
                f"{cpu}: whole training step, MoLF / fused AdamW",
                1.05,
                over(load(f"train_cpu_{machine}"), "molf", "fft"),
            ),
            (f"{cpu}: optimizer step without its matmuls, dense wins everywhere (`molf-dense-late`)", 1.6, dense),
            (f"{cpu}: the same, LoRA wins everywhere", 1.1, lora),
        ]
    for size, shape in GPU_SHAPES.items():
        for bench, text, bar in (
            ("train", "whole training step", 1.03),
            ("step", "optimizer step with its matmuls", 1.35),
        ):
            if (RESULTS / f"bench_{bench}_gpu_{size}.json").exists():
                found = over(load(f"{bench}_gpu_{size}"), "molf", "fft-amp")
                rows.append((f"{shape} on a GPU, {text}, MoLF / fused AdamW of fp32 weights", bar, found))
    cells = [[what, f"{bar:g}", f"{value:.4g}", "yes" if value <= bar else "**no**"] for what, bar, value in rows]
    few = min(len(row(data, "fft")["rounds"]["total"]) for data in (load("step_cpu"), train, four))
    trial = f"\n\nOnly {few} rounds where nine are the rule: a trial of the tools, no result." if few < 9 else ""
    return table(["what", "at most", "measured", "met"], cells) + trial


def _without_matmuls(step: Result) -> list[float]:
    """The optimizer's step without its matmuls over fused AdamW's, where dense wins and where LoRA does."""
    return [over(step, name, "fft", "without_matmuls") for name in ("molf-dense-late", "molf-lora")]


def growth_r2(name: str) -> float:
    """r² of the linear fit of step time to parameters."""
    data = load("growth_cpu")
    entries = [row(data, f"{name}@cpu-growth-{size}") for size in SIZES]
    medians = [entry["summary"]["total"]["median"] for entry in entries]
    return correlation([entry["parameters"] for entry in entries], medians) ** 2


def experts_spread() -> float:
    """The slowest number of experts over the fastest."""
    data = load("experts_cpu")
    relative = [over(data, label, EXPERTS[0]) for label in EXPERTS]
    return max(relative) / min(relative)


def memory_without_experts(data: Result, label: str) -> float:
    """Peak without the experts and their moments over full fine-tuning's."""
    state = row(data, label)["bytes"]["state"]
    experts = sum(size for name, size in state.items() if name.startswith("lora_")) / 2**20
    peak, peer = (row(data, name)["summary"]["total"]["median"] for name in (label, "fft"))
    return (peak - experts) / peer


def step() -> str:
    """The optimizer's step alone."""
    data = load("step_cpu")
    return table(*_steps(data, STEPPED, "fft")) + "\n" + where(data)


def _steps(data: Result, labels: tuple[str, ...], peer: str) -> tuple[list[str], list[list[str]]]:
    head = ["contender", "ms", "quartiles", f"/ {peer}", "gradients of A, B", "rewrite of P", f"rest / {peer}"]
    head += ["first step", "of copy bandwidth", "dense wins"]
    rows = []
    for label in labels:
        entry = row(data, label)
        if "error" in entry:
            rows.append([label, "out of memory", *[""] * (len(head) - 2)])
            continue
        s = entry["summary"]
        parts = [f"{s[key]['median']:.2f}" if key in s else "-" for key in ("gradients", "rewrite")]
        rest = times(data, label, peer, 2, "without_matmuls") if "without_matmuls" in s else "-"
        busy = s.get("without_matmuls", s["total"])["median"]
        moved = entry["floor_bytes"]
        share = f"{moved / busy / 1e6 / data['copy_gb_per_s']:.0%}" if moved else "-"
        wins = entry["dense_wins"]
        cells = [f"{s['total']['median']:.2f}", f"{s['total']['q1']:.2f} to {s['total']['q3']:.2f}"]
        cells += [times(data, label, peer, 2), *parts, rest, f"{entry['warmup'][0]:.0f}", share]
        rows.append([label, *cells, "-" if wins is None else f"{wins:.0%}"])
    return head, rows


def train() -> str:
    """The whole training step, and with four accumulated batches."""
    one, four = load("train_cpu"), load("train_cpu_accumulation")
    head = ["contender", "ms", "quartiles", "tokens/s", "/ fft", "/ lora", "four batches / fft"]
    rows = []
    for label in TRAINED:
        more = f"{over(four, label, 'fft'):.3f}" if label in four["contenders"] else "-"
        rows.append([label, *_train_cells(one, label, ("fft", "lora")), more])
    return table(head, rows) + "\n" + where(one)


def _train_cells(data: Result, label: str, peers: tuple[str, ...]) -> list[str]:
    entry = row(data, label)
    if "error" in entry:
        return ["out of memory", *[""] * (2 + len(peers))]
    total = entry["summary"]["total"]
    ratios = [times(data, label, peer) for peer in peers]
    return [
        f"{total['median']:,.0f}",
        f"{total['q1']:,.0f} to {total['q3']:,.0f}",
        f"{entry['tokens_per_s']:,.0f}",
        *ratios,
    ]


def other_cpus() -> str:
    """What the bars of time say on other CPUs."""
    head = ["contender", "step", "step without its matmuls", "whole training step", "over"]
    parts = []
    for machine, cpu in OTHER_CPUS.items():
        step, train = load(f"step_cpu_{machine}"), load(f"train_cpu_{machine}")
        rows = []
        for label in (*FORCED, "molf-e"):
            peer = "lora" if label == "molf-e" else "fft"
            rest = times(step, label, peer, 2, "without_matmuls") if label in FORCED else "-"
            rows.append([label, times(step, label, peer, 2), rest, times(train, label, peer), f"/ {peer}"])
        parts.append(f"**{cpu}**\n\n{table(head, rows)}\n{where(step)}\n{where(train)}")
    return "\n\n".join(parts)


def memory() -> str:
    """Peak memory, and what the tensors account for."""
    data = load("memory_cpu")
    head = ["contender", "peak MiB", "/ fft", "weights", "gradients", "moments", "W", "experts and their moments"]
    rows = []
    for label in WEIGHED:
        entry = row(data, label)
        sizes, state = entry["bytes"], entry["bytes"]["state"]
        experts = sum(size for name, size in state.items() if name.startswith("lora_"))
        base = state.get("base", 0)
        parts = [sizes["weights"], sizes["gradients"], sum(state.values()) - experts - base, base, experts]
        peak = entry["summary"]["total"]["median"]
        cells = [f"{peak:.0f}", f"{over(data, label, 'fft'):.3f}", *(f"{part / 2**20:.1f}" for part in parts)]
        rows.append([label, *cells])
    return table(head, rows) + "\n" + where(data)


def growth() -> str:
    """Step time over size, and over the number of experts."""
    sizes, experts = load("growth_cpu"), load("experts_cpu")
    rows = []
    for size in SIZES:
        labels = [f"{name}@cpu-growth-{size}" for name in ("fft", GROWN)]
        own = [f"{row(sizes, label)['summary']['total']['median']:.2f}" for label in labels]
        millions = row(sizes, labels[0])["parameters"] / 1e6
        rows.append([f"cpu-growth-{size}", f"{millions:.1f} M", *own, f"{over(sizes, labels[1], labels[0]):.2f}"])
    first = table(["shape", "parameters", "fft, ms", f"{GROWN}, ms", f"{GROWN} / fft"], rows)
    fit = f"\nr² of step time over parameters: fft {growth_r2('fft'):.4f}, {GROWN} {growth_r2(GROWN):.4f}.\n\n"
    rows = []
    for label in EXPERTS:
        time = row(experts, label)["summary"]["total"]["median"]
        rows.append([f"`{label}`", f"{time:.2f}", f"{over(experts, label, EXPERTS[0]):.3f}"])
    return first + "\n" + fit + table(["contender", "ms", "/ one expert"], rows) + "\n" + where(experts)


def overhead() -> str:
    """Many small layers: what is measured is Python and kernel launches."""
    data = load("overhead_cpu")
    labels = ("fft", "fft-foreach", *FORCED, "molf-superposed", "lora", "molf-e")
    rows = []
    for label in labels:
        total = row(data, label)["summary"]["total"]
        rows.append([label, f"{total['median']:.2f}", f"{over(data, label, 'fft'):.2f}"])
    return table(["contender", "ms", "/ fft"], rows) + "\n" + where(data)


def compilers() -> str:
    """The passes by C++, Inductor and plain torch."""
    data = json.loads((RESULTS / "compilers.json").read_text())
    ms, first, e = data["ms"], data["first"], data["environment"]
    parts, fused = ("moments, score", "update"), median(ms["fused AdamW"])
    rows = [["fused AdamW, all in one", "-", "-", f"{fused:.1f}", "1.00", "-"]]
    for name in ("C++", "Inductor", "uncompiled"):
        each = [f"{name}: {part}" for part in parts]
        whole = [a + b for a, b in zip(*(ms[key] for key in each), strict=True)]
        cells = [f"{median(ms[key]):.1f}" for key in each]
        over_fused = median(a / b for a, b in zip(whole, ms["fused AdamW"], strict=True))
        seconds = sum(first[key] for key in each) / 1e3
        rows.append([name, *cells, f"{median(whole):.1f}", f"{over_fused:.2f}", f"{seconds:.1f}"])
    head = ["passes by", "moments and score, ms", "update, ms", "both, ms", "/ fused AdamW", "first call, s"]
    note = (
        f"\n{data['elements'] / 1e6:.1f} M elements in fp32, {e['cpu']}, {e['threads']} threads, torch {e['torch']}, "
        f"{len(ms['fused AdamW'])} rounds, commit {e['commit']}."
    )
    return table(head, rows) + "\n" + note


def gpu() -> str:
    """Every GPU result that is there."""
    parts = []
    for size, shape in GPU_SHAPES.items():
        if not (RESULTS / f"bench_step_gpu_{size}.json").exists():
            parts.append(f"{shape}, bf16, 8 x 1,024 tokens, rank 128: not measured.")
            continue
        data = load(f"step_gpu_{size}")
        waits = {label: entry.get("syncs") or {} for label, entry in data["contenders"].items()}
        listed = "; ".join(
            f"{name}: {', '.join(f'{k} {v}' for k, v in found.items() if v) or 'none'}" for name, found in waits.items()
        )
        parts.append(f"{shape}, optimizer step\n\n{table(*_steps(data, ON_GPU, 'fft-amp'))}\n{where(data)}")
        parts.append(f"Waits for the device in one step, from a profiler's trace. {listed}.")
        for suffix, text in (("", "without"), ("_checkpointing", "with")):
            if not (RESULTS / f"bench_train_gpu_{size}{suffix}.json").exists():
                parts.append(f"{shape}, training step {text} gradient checkpointing: not measured.")
                continue
            trained = load(f"train_gpu_{size}{suffix}")
            head = ["contender", "ms", "quartiles", "tokens/s", "/ fft-amp", "/ fft", "/ lora", "peak GiB"]
            rows = []
            for label in ON_GPU:
                peak = f"{row(trained, label)['peak_mib'] / 2**10:.1f}" if row(trained, label)["summary"] else ""
                rows.append([label, *_train_cells(trained, label, ("fft-amp", "fft", "lora")), peak])
            parts.append(
                f"{shape}, training step {text} gradient checkpointing\n\n{table(head, rows)}\n{where(trained)}"
            )
    return "\n\n".join(parts)


def _drawn() -> dict[str, dict[str, float]]:
    """The numbers of the figure: ratios to full fine-tuning."""
    trained, weights = load("train_cpu"), load("memory_cpu")
    return {
        "whole training step, time": {label: over(trained, label, "fft") for label in TRAINED},
        "peak memory": {label: over(weights, label, "fft") for label in WEIGHED},
    }


def digest() -> str:
    """Names the numbers that the figure shows."""
    return hashlib.sha256(json.dumps(_drawn()).encode()).hexdigest()[:16]


def draw() -> None:
    """Write the figure; the digest of its numbers is in its metadata."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "molf", "svg.fonttype": "none", "font.size": 9}
    drawn = _drawn()
    figure, axes = plt.subplots(1, len(drawn), figsize=(9, 3), layout="constrained")
    for axis, (title, values) in zip(axes, drawn.items(), strict=True):
        names = list(values)[::-1]
        bars = axis.barh(names, [values[name] for name in names], color="#4c72b0")
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="0.7", linewidth=0.8, zorder=0)
        axis.set(title=f"{title} / fft", xlim=(0, 1.15 * max(values.values())))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, metadata={"Date": None, "Description": digest()})
    plt.close(figure)


def low_memory() -> str:
    """The options that save memory: bytes, time of a step, and what a real run ends with."""
    data, steps = json.loads((RESULTS / "low_memory.json").read_text()), load("low_memory_cpu")
    labels = {"fp32": "molf", "fp32, keep_base=False": LESS[0], "fp32, moments_8bit=True": LESS[1]}
    head = ["weights and options", "bytes per weight", "step / default", "exact match", "score", "last losses"]
    rows = []
    for mode in dict.fromkeys(run["mode"] for run in data["runs"]):
        runs = [run for run in data["runs"] if run["mode"] == mode]
        if {run["seed"] for run in runs} != {0, 1}:
            raise ValueError(f"{mode} has not the seeds 0, 1: run benchmarks/low_memory.py")
        cells = [spread([run[key] for run in runs], digits) for key, digits in (("exact_match", 1), ("score", 1))]
        cells.append(spread([run["last_losses"] for run in runs], 4))
        speed = times(steps, labels[mode], "molf", 2) if mode in labels else "-"
        rows.append([f"`{mode}`", f"{mean(run['bytes_per_weight'] for run in runs):.1f}", speed, *cells])
    note = (
        "\nstories3M, 500 CounterFact facts, 8 epochs, r 64, mean ± sd of seeds 0, 1; losses in nats per token over "
        f"the last 15 steps. One CPU thread, torch {data['versions']['torch']}. Bytes are of a routed weight with its "
        "gradient, moments and master at the end of the run, without experts. The step is that of `cpu-small`, fp32."
    )
    return table(head, rows) + "\n" + note


def drift() -> str:
    """W computed against W kept."""
    data = json.loads((RESULTS / "low_memory.json").read_text())
    head = ["steps", "largest relative difference of a P", "same winners", "loss, W kept", "loss, W computed"]
    rows = [
        [
            str(entry["steps"]),
            f"{entry['relative_difference']:.1e}",
            f"{entry['same_winners']:.2%}",
            f"{entry['loss_kept']:.5f}",
            f"{entry['loss_computed']:.5f}",
        ]
        for entry in data["drift"]
        if entry["steps"] in (100, 200, 500, 1000)
    ]
    return table(head, rows)


def spread(values: list[float], digits: int) -> str:
    """Mean ± sd."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


TABLES = (bars, step, train, other_cpus, memory, low_memory, drift, growth, overhead, compilers, gpu)
