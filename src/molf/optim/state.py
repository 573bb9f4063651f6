"""What MoLFAdamW keeps: groups, masters, experts and moments; how the model follows them, and how they are saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import quantized, virtual
from .adamw import moment_dtype
from .checkpoint import DECISIVE, check_form, check_loadable, with_bare_groups
from .config import MoLFConfig
from .guards import WrittenTensors
from .layout import RoutedModule, Slot
from .parts import Part
from .passes import Passes
from .scalars import numbers
from .sharding import (
    ProcessesDifferError,
    Shards,
    compare_replicas,
    fitted,
    is_distributed,
    local,
    same_everywhere,
)
from .stacks import MOMENTS
from .virtual import Products

PRECISE = ("base", "lora_A", "lora_B")
"""Names in the state of what weights of the model are made of."""


class MoLFState(Optimizer):
    """The state of ``MoLFAdamW``, without its step; see there for what is in ``param_groups`` and ``state``.

    Args:
        params: Parameter groups with the key "expert".
        config: Experts, scales, scores and rates.
        modules: The routed modules as slots of ``params``.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], config: MoLFConfig, modules: Sequence[RoutedModule] = ()
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("an optimizer cannot be made under torch.inference_mode(): make it outside")
        self.config = config
        self.experts = config.experts
        self.modules = tuple(modules)
        self._segments: dict[torch.device, Tensor] = {}
        self._spread: dict[tuple[Any, ...], Tensor] = {}
        self._written = WrittenTensors()
        defaults = {
            "lr": config.lr if config.train_base else config.lora_lr,  # schedulers relate a least rate to it
            "weight_decay": 0.0,
            "expert": "other",
            **{name: getattr(config, name) for name in ("betas", "eps", *DECISIVE)},
        }
        super().__init__(params, defaults)
        every = [p for group in self.param_groups for p in group["params"]]
        device = every[0].device if every else torch.device("cpu")
        self._passes = Passes(config.compile, sum(p.numel() for p in every), device)
        self.shards = Shards.of(every)
        for module in self.modules:
            if self._is_virtual(module):
                weight = self._parameter(module.slots[0])
                rank, dtype = sum(config.expert_ranks), moment_dtype(weight)
                virtual.make_experts(self.state[weight], weight, rank, module.transposed, dtype)
                if config.keep_base:
                    self.state[weight].setdefault("base", weight.detach())  # W = P while B = 0
        self._made = self._versions()

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but the caches and the hooks, so that copies and pickles work."""
        own = ("config", "experts", "modules", "shards", "_passes", "_written", "_made")
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in own},
            "_segments": {},
            "_spread": {},
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make the state of its parameters at once; a group without "expert" is not routed.

        Raises:
            ValueError: If "expert" is none of this optimizer's groups, or one of modules, which are what they are, or a
                parameter cannot be rounded.
        """
        known = {"other", "other_no_decay"}
        if not hasattr(self, "_passes"):  # as it is made
            known |= {*self.experts, "dense_bias", "base"}
        if param_group.setdefault("expert", "other") not in known:
            raise ValueError(f"expert={param_group['expert']!r}: choose one of {', '.join(sorted(known))}")
        param_group.setdefault("lr", self.config.lr)
        params = param_group["params"] = _listed(param_group["params"])
        param_group.setdefault("param_names", [f"added.{len(self.param_groups)}.{i}" for i in range(len(params))])
        for pair in zip(param_group["param_names"], params, strict=True):
            name, parameter = pair[1] if isinstance(pair[1], tuple) else pair  # named ones, as torch takes them
            if parameter.dtype == torch.float16 and not self.config.keep_base:
                raise ValueError(
                    f"keep_base=False and {name} is float16, which is not rounded stochastically: use bfloat16, or "
                    "keep_base=True"
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        untouched = hasattr(self, "_made") and self._made == self._versions()
        for parameter in group["params"]:
            self.state[parameter].update(self._new_state(parameter, group["expert"]))
        if untouched:
            self._made = self._versions()

    @property
    def routed_modules(self) -> list[str]:
        """Names of the routed modules, in model order."""
        return [module.name for module in self.modules]

    @property
    def steps_taken(self) -> int:
        """Number of optimizer steps so far."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    def _check_processes(self) -> None:
        """Refuse a step in which this process has parameters that are not the model's any more."""
        every = [p for group in self.param_groups for p in group["params"]]
        skipped = self.steps_taken == 0 and all(p.grad is None for p in every)
        if skipped or any(p not in self.state for p in every):
            raise ProcessesDifferError(
                "no gradient reaches the optimizer's parameters: was the model sharded after its optimizer was made? "
                "Make the optimizer after fully_shard"
            )

    def compare_replicas(self) -> None:
        """See that all processes hold the same of what is not sharded: weights, experts, moments and step counts.

        One all-reduce of two integers per tensor; every process calls it.

        Raises:
            ProcessesDifferError: Naming the first tensor that differs.
        """
        names = [name for group in self.param_groups for name in group["param_names"]]
        every = [p for group in self.param_groups for p in group["params"]]
        state = [(f"{n} ({key})", t) for n, p in zip(names, every, strict=True) for key, t in self.state[p].items()]
        compare_replicas([*zip(names, every, strict=True), *state])

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Rewrite the model from the state, after someone has written to the state.

        With ``keep_base=False`` the state has no W, so that nothing is rewritten.
        """
        self._follow_devices()
        for module in self.modules:
            weight = self._parameter(module.slots[0])
            if self._is_virtual(module):
                if local(self.state[weight]["lora_B"]).any():
                    self._own_base(weight)
                base = self.state[weight].get("base", weight)
                if not virtual.shares_storage(base, weight):
                    self._write_products([self._products(module, weight, base)])
            for slot in module.slots[int(self._is_virtual(module)) :]:
                self._write(self._parameter(slot), {})
        for slot in self._unrouted():
            self._write(self._parameter(slot), {})
        self._remember_written()

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer: tensors, numbers and strings, the parameters by their index.

        The first group repeats the settings of those without parameters, which torch's distributed checkpoint drops.
        Tensors are the state's own; of a W that is the weight itself, a copy.
        """
        saved = super().state_dict()
        for index, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            own = saved["state"][index]
            if "base" in own and virtual.shares_storage(own["base"], parameter):
                # torch's distributed checkpoint loads into what it is given, and P is another tensor of it
                saved["state"][index] = {**own, "base": own["base"].clone()}
        bare = {str(i): dict(group) for i, group in enumerate(saved["param_groups"]) if not group["params"]}
        if bare:
            next(group for group in saved["param_groups"] if group["params"])["without_parameters"] = bare
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state saved by ``state_dict``, every tensor in the precision that this optimizer keeps it in.

        torch casts the state of a bf16 parameter to bf16 on load; here masters and moments stay fp32, and
        the next step is bit-identical to the uninterrupted run's. Weights of the model that the state says, over LoRA
        experts or in 16 bits, follow it. Nothing changes if an error is raised.

        Of sharded parameters the state may be sharded by other processes' number, or whole: it is distributed anew.

        Raises:
            ValueError: If the state is of other experts, another score or other parameters.
            CompileError: With ``compile=True``, if there is no working compiler.
        """
        kept, saved = self.state, {}
        untouched = self.steps_taken == 0 and self._versions() == self._made

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            saved.update(with_bare_groups(given))
            check_loadable(self, saved)
            self._follow_devices()
            self._passes.prepare()
            return {"state": {}, "param_groups": saved["param_groups"]}

        def fill(_: Optimizer) -> None:
            self.state = kept
            ids = [index for group in saved["param_groups"] for index in group["params"]]
            changed = False
            for index, parameter in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
                for key, value in saved["state"][index].items():
                    # in place: W may be the weight itself, and accelerate loads the state into itself
                    own = self.state[parameter][key]
                    given = local(fitted(value, own)).to(local(own).device)
                    changed = changed or (key in PRECISE and not torch.equal(given, local(own)))
                    local(own).copy_(given)
            # a new state, loaded into itself, would undo what was loaded into the model since it was made
            if changed or not untouched:
                self.sync_weights()
            else:
                self._made = self._versions()

        check_form(state_dict)
        # after the hooks that others registered to change what is loaded, and before those that look at it
        hooks = self.register_load_state_dict_pre_hook(take), self.register_load_state_dict_post_hook(fill, True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _versions(self) -> list[int]:
        """How often what weights are made of was written to."""
        return [local(s[key])._version for s in self.state.values() for key in PRECISE if key in s]

    def _follow_devices(self) -> None:
        """Move the state to where its parameters are: an optimizer may be made before its model is moved."""
        for parameter, state in self.state.items():
            device = local(parameter).device
            moved = {key: each.to(device) for key, each in state.items() if key != "step" and each.device != device}
            stored = "base" in moved and moved["base"].dtype == parameter.dtype
            if stored and not local(state["lora_B"]).any():
                moved["base"] = parameter.detach()  # W = P while B = 0
            state.update(moved)
        self._passes.move(next(iter(self.state)).device)

    def _new_state(self, parameter: Tensor, expert: str) -> dict[str, Tensor]:
        """``step``, ``exp_avg`` and ``exp_avg_sq`` unless it is frozen, and ``base``, a 16-bit parameter's master."""
        dtype = moment_dtype(parameter)
        state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
        if dtype != parameter.dtype and self.config.keep_base:
            master = parameter.detach().to(dtype, copy=True)
            # DistributedDataParallel, too, takes the first process's weights
            state["base"] = master if is_distributed(master) else same_everywhere(master)
        in_8_bits = self.config.moments_8bit and expert not in self._lora_experts  # LoRA's are small
        for name in MOMENTS if expert != "base" else ():
            if in_8_bits:
                state[name] = quantized.zeros(parameter, signed=name == "exp_avg")
            else:
                state[name] = torch.zeros_like(parameter, dtype=dtype)
        return state

    def _is_virtual(self, module: RoutedModule) -> bool:
        """Whether its LoRA experts are state beside the weight."""
        return module.lora_A is None and bool(self.config.expert_ranks)

    def _own_base(self, weight: Tensor) -> None:
        """Give a layer whose W is the weight itself a W of its own, before they differ."""
        state = self.state[weight]
        if "base" in state and virtual.shares_storage(state["base"], weight):
            state["base"] = weight.detach().clone()

    def _products(self, module: RoutedModule, target: Tensor, base: Tensor) -> Products:
        """What P = W + Σ s_i B_i A_i is made of; ``target`` takes P."""
        state = self.state[self._parameter(module.slots[0])]
        A, B = local(state["lora_A"]), local(state["lora_B"])
        return virtual.products([local(target)], [local(base)], A[None], B.T[None], module.transposed)

    def _scales(self, like: Tensor) -> float | Tensor:
        """The scale s of the LoRA experts: a number where all have the same, else one per rank, (R,)."""
        scales = self.config.scales
        return scales[0] if len(set(scales)) == 1 else self._per_rank(scales, like)

    def _write_products(self, listed: Sequence[Products]) -> None:
        """Let weights over virtual experts follow: P = W + Σ s_i B_i A_i, accumulated and rounded once."""
        places: dict[tuple[torch.device, torch.dtype], list[Products]] = defaultdict(list)
        for each in listed:
            places[each.left.device, each.left.dtype].append(each)
        for there in places.values():
            scales, nearest = self._per_rank(self.config.scales, there[0].left), self.config.keep_base
            taken = set(self._passes.superpose(there, scales) if nearest else ())
            # one by one: a product of several at once rounds otherwise than of one, as after a resume
            for each in (each for i, each in enumerate(there) if i not in taken):
                for target, base, left, right in zip(*each, strict=True):
                    if base.dtype == target.dtype:
                        virtual.superpose(base, left, right, self._scales(left), out=target)
                    else:
                        self._store(target, virtual.superpose(base, left, right, self._scales(left)))

    def _write(self, parameter: Tensor, values: Mapping[int, Tensor]) -> None:
        """Let a tensor of the model follow its precise value: the master, or one of ``values``, by the tensor's id."""
        value = values.get(id(parameter), self.state[parameter].get("base"))
        if value is not None:
            self._store(parameter, local(value))

    def _store(self, parameter: Tensor, value: Tensor) -> None:
        if parameter.dtype == torch.bfloat16 and not self.config.keep_base:
            virtual.round_stochastically(value, local(parameter))
        else:
            local(parameter).copy_(value)

    def _prepare_base(self, module: RoutedModule, values: dict[int, Tensor]) -> None:
        """Before a LoRA expert moves a W of its own; where the state has none, W in ``values`` before any update."""
        weight = self._parameter(module.slots[0])
        if "base" in self.state[weight]:
            self._own_base(weight)
        else:
            held = local(weight.detach()).to(moment_dtype(weight))
            _, _, (left,), (right,) = self._products(module, held, held)
            values[id(weight)] = virtual.superpose(held, left, right, self._scales(held), sign=-1)

    def _derived(self) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """The model's tensors that this optimizer rewrites from its state.

        Name, tensor, the precise value of what it has to hold, and by how much that may differ: P that was written
        elsewhere, or with other layers, may be of products that add up in another order.
        """
        self._follow_devices()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if "base" in self.state[parameter] and "lora_A" not in self.state[parameter]:
                    yield name, local(parameter), local(self.state[parameter]["base"]), 0.0
        for module in self.modules:
            weight = self._parameter(module.slots[0])
            base = self.state[weight].get("base", weight)
            if self._is_virtual(module) and not virtual.shares_storage(base, weight):
                expected = torch.empty_like(local(base))
                self._write_products([self._products(module, expected, base)])
                rounding = 2**-19 if weight.dtype == expected.dtype else 2**-15  # a GPU multiplies halves of factors
                moved = (expected - local(base)).abs()
                yield module.name, local(weight), expected, rounding * float(moved.max()) if moved.numel() else 0.0

    def _rewritten(self) -> Iterator[Tensor]:
        return (parameter for parameter, state in self.state.items() if "base" in state)

    def _check_written(self) -> None:
        self._written.check(self._rewritten(), self._derived)

    def _remember_written(self) -> None:
        self._written.remember(self._rewritten())

    def _unrouted(self) -> list[Slot]:
        """Where the parameters are that are not routed."""
        others = [(i, group) for i, group in enumerate(self.param_groups) if group["expert"].startswith("other")]
        return [(i, j) for i, group in others for j in range(len(group["params"]))]

    def _parameter(self, slot: Slot) -> Tensor:
        return self.param_groups[slot[0]]["params"][slot[1]]

    def _group(self, expert: str) -> dict[str, Any]:
        return next(group for group in self.param_groups if group["expert"] == expert)

    def _group_of(self, part: Part) -> dict[str, Any]:
        """The group of its tensors: of A and B that of the first LoRA expert, by whose betas and ε they go."""
        return self._group(self._lora_experts[0]) if part.by_row else self.param_groups[part.slots[0][0]]

    def _is_uniform(self) -> bool:
        """Whether all groups have the same betas and ε, which schedulers may change."""
        first = self.param_groups[0]
        return all(group["betas"] == first["betas"] and group["eps"] == first["eps"] for group in self.param_groups)

    @property
    def _lora_experts(self) -> tuple[str, ...]:
        return self.experts[int(self.config.train_base) :]

    def _precise(self, parameter: Tensor, values: dict[int, Tensor]) -> tuple[Tensor, Tensor | None]:
        """A parameter's precise value, and itself where it takes that rounded: of a sharded one, this process's part.

        Args:
            parameter: Of a group.
            values: Takes, by the parameter's id, a precise value that is in no state: of a 16-bit parameter without a
                master.
        """
        state = self.state[parameter]
        if "base" in state:
            return local(state["base"]), None if "lora_A" in state else local(parameter)
        if moment_dtype(parameter) != parameter.dtype:
            values.setdefault(id(parameter), local(parameter.detach()).to(moment_dtype(parameter)))
        return local(values.get(id(parameter), parameter)), None

    def _per_rank(self, per_expert: Sequence[float], like: Tensor) -> Tensor:
        """One number per LoRA expert, spread over the rank axis, (R,)."""
        key = (*per_expert, like.dtype, like.device)
        if key not in self._spread:
            if len(self._spread) > 64:  # learning rates change at every step
                self._spread.clear()
            self._spread[key] = numbers(per_expert, like)[self._segments_on(like.device)]
        return self._spread[key]

    def _segments_on(self, device: torch.device) -> Tensor:
        """The LoRA expert of every rank: ranks (2, 3) give [0, 0, 1, 1, 1]."""
        if device not in self._segments:
            segments = [i for i, rank in enumerate(self.config.expert_ranks) for _ in range(rank)]
            self._segments[device] = torch.tensor(segments, dtype=torch.long, device=device)
        return self._segments[device]


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)
