"""Invariant 1: trajectories of the published implementation, and the project's own of the reference twin."""

from pathlib import Path

import pytest
import torch
from golden import Replay, load_case

SHARED = Path(__file__).parents[3] / "shared" / "golden"
OWN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in SHARED.glob("*.json"))
OWN_CASES = sorted(path.stem for path in OWN.glob("*.json"))


@pytest.mark.parametrize("form", ["fused", "adapter"])
@pytest.mark.parametrize("case", CASES or [pytest.param("", marks=pytest.mark.skip(reason=f"no {SHARED}"))])
def test_published_implementation(case: str, form: str) -> None:
    compare(SHARED, case, form)


@pytest.mark.parametrize("form", ["fused", "adapter"])
@pytest.mark.parametrize("case", OWN_CASES)
def test_reference_twin(case: str, form: str) -> None:
    compare(OWN, case, form)


def test_own_cases_are_all_there_and_their_winners_switch() -> None:
    from make_golden import CASES as EXPECTED

    assert sorted(EXPECTED) == OWN_CASES
    for case in OWN_CASES:
        recorded = load_case(OWN, case)[1]
        assert max(len(recorded[f"winner/{name}"].unique(dim=0)) for name in ("fc1", "fc2")) > 1


def compare(folder: Path, case: str, form: str) -> None:
    spec, recorded = load_case(folder, case)
    replay = Replay(spec, recorded, form)
    seen = replay.run()
    double = spec["dtype"] == "float64"
    # Recorded float64 against float64: rounding of 25 to 40 steps; float32: the README's derivation.
    tolerance = 1e-10 if double else (1e-6 if spec["model"]["kind"] == "mlp" else 5e-5)
    torch.testing.assert_close(
        torch.tensor(seen["loss"], dtype=torch.float64), recorded["loss"], rtol=1e-12 if double else 1e-5, atol=0
    )
    for module in spec["modules"]:
        name = module["name"]
        assert seen[f"winner/{name}"] == recorded[f"winner/{name}"].tolist()
        scores = torch.tensor(seen[f"score/{name}"], dtype=torch.float64)
        torch.testing.assert_close(scores, recorded[f"score/{name}"], rtol=1e-4, atol=0)
    last = f"param/step_{spec['hyper']['steps']:04d}/"
    compared = 0
    for name, value in replay.final().items():
        if last + name in recorded:
            torch.testing.assert_close(value, recorded[last + name], rtol=0, atol=tolerance)
            compared += 1
    assert compared == sum(key.startswith(last) for key in recorded)
