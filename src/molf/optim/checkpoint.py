"""Whether a saved optimizer state fits an optimizer. Looked at in full before anything is loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .quantized import as_float, is_quantized
from .sharding import anywhere, local

DECISIVE = tuple("expert_ranks scales score_fn top_k policy random_shares policy_seed".split())
"""Settings of ``MoLFConfig`` that every group has, and that have to be the same where a state is loaded."""

_NEEDED = {"params", "lr", "weight_decay", "betas", "eps"}


def check_form(state_dict: Any) -> None:
    """Whether it is the state of an optimizer at all.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("the optimizer state has no 'state' and 'param_groups': it was not saved by state_dict()")


def with_bare_groups(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved state whose groups without parameters have their settings, which the first group repeats."""
    groups = [dict(group) for group in state_dict["param_groups"]]
    bare: dict[str, Any] = next(
        (group.pop("without_parameters") for group in groups if "without_parameters" in group), {}
    )
    groups = [{**group, **bare.get(str(i), {})} for i, group in enumerate(groups)]
    for group in groups:  # where torch flattens and unflattens a state, tuples become lists and empty lists are lost
        if not group.get("params"):
            group.setdefault("param_names", [])
        listed = {key: value for key, value in group.items() if isinstance(value, list)}
        group |= {key: tuple(value) for key, value in listed.items() if key not in ("params", "param_names")}
    return {**state_dict, "param_groups": groups}


def check_loadable(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Compare settings, parameter names, state keys and shapes of a saved state with the optimizer's.

    Raises:
        ValueError: Naming the first thing that differs, with both values.
    """
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved_groups) != len(groups):
        names = [[group.get("expert", "?") for group in side] for side in (saved_groups, groups)]
        raise ValueError(
            f"the optimizer state has the groups {names[0]}, this optimizer has {names[1]}: use the same config"
        )
    for saved, own in zip(saved_groups, groups, strict=True):
        for key in ("expert", *DECISIVE, "param_names"):
            if key not in saved or _plain(saved[key]) != _plain(own[key]):
                difference = _difference(_plain(saved.get(key)), _plain(own[key]))
                raise ValueError(f"the optimizer state was made with {key}={difference}: use the same config and model")
        missing = sorted(_NEEDED - saved.keys())  # schedulers keep more in a group
        if missing:
            raise ValueError(f"the optimizer state's group {own['expert']} lacks {missing}: the file is damaged")
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(f"the optimizer state's group {own['expert']} has other parameters: use the same model")
    ids = [index for group in saved_groups for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    own_names = [name for group in groups for name in group["param_names"]]
    by_name = all(isinstance(index, str) for index in ids)  # torch's distributed checkpoint names parameters
    if len({*ids}) != len(parameters) or not (by_name or ids == list(range(len(parameters)))):
        raise ValueError(
            "the optimizer state numbers its parameters in another order: it was not saved by state_dict()"
        )
    for index, parameter, name in zip(ids, parameters, own_names, strict=True):
        _check_entry(name, state_dict["state"].get(index, {}), optimizer.state[parameter])
    named = [
        (f"{key} of {name}", value)
        for index, name in zip(ids, own_names, strict=True)
        for key, value in state_dict["state"].get(index, {}).items()
    ]
    broken = next((name for name, value in named if not as_float(local(value)).isfinite().all()), None)
    if anywhere(broken is not None, [value for _, value in named]):
        raise ValueError(
            f"{broken or 'what another process holds'} is not finite in the optimizer state: take an older checkpoint"
        )


def _check_entry(name: str, saved: dict[str, Any], own: dict[str, Any]) -> None:
    if saved.keys() != own.keys():
        difference = sorted(saved.keys() ^ own.keys())
        raise ValueError(f"the optimizer state of {name} differs in {difference}: use the same config and precision")
    for key, value in own.items():
        if not isinstance(saved[key], Tensor) or saved[key].shape != value.shape:
            shape = tuple(getattr(saved[key], "shape", ()))
            raise ValueError(f"{key} of {name} has shape {shape} in the optimizer state, here {tuple(value.shape)}")
        if is_quantized(saved[key]) != is_quantized(value):
            raise ValueError(f"{key} of {name} is kept otherwise in the optimizer state: use the same moments_8bit")
        if saved[key].dtype != value.dtype and key != "step":
            raise ValueError(f"{key} of {name} is {saved[key].dtype} in the optimizer state, here {value.dtype}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _difference(saved: Any, own: Any) -> str:
    """Both values, or of two long lists the first entries that differ."""
    if isinstance(saved, list) and isinstance(own, list) and len(own) > 8:
        pairs = [(s, o) for s, o in zip(saved, own, strict=False) if s != o]
        saved, own = pairs[0] if pairs else (f"{len(saved)} entries", f"{len(own)} entries")
    return f"{saved!r}, this optimizer has {own!r}"
