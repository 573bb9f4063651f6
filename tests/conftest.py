"""One thread, seeds everywhere, nothing from the network."""

import json
import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # for the processes that tests start: sums depend on the number of threads
}

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """A CounterFact file in the original form: 40 edits of the bundled world."""
    from molf.world import counterfactual_edits, make_world

    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps(counterfactual_edits(make_world(), 40)))
    return path


@pytest.fixture
def model_without_eos(tmp_path):
    """The bundled model with a tokenizer that has no end token."""
    import shutil

    from molf.assets import BUNDLED_MODEL

    folder = tmp_path / "no-eos"
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    return folder
