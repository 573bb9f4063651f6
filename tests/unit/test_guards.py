"""What users do to models and optimizers around the step: copies, conversions, loads, other adapters."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from models import causal_lm, lm_step
from molf import (
    MoLFAdamW,
    MoLFConfig,
    MoLFOptimizerFactory,
    NonFiniteGradientError,
    RoutingRecorder,
    create_molf_optimizer,
    molf_lora_config,
    read_routing,
)

TWO = MoLFConfig(expert_ranks=(2,))
EFFICIENT = MoLFConfig(expert_ranks=(2, 4), train_base=False)


class Nested(nn.Module):
    """A model whose head has layers of names that the body has too."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.classifier = nn.Linear(4, 4), nn.Sequential()
        self.classifier.dense, self.classifier.out_proj = nn.Linear(4, 4), nn.Linear(4, 2)

    def get_output_embeddings(self):
        return None


def test_all_linear_is_by_type_not_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 2)))
    assert create_molf_optimizer(model, TWO).routed_modules == ["0", "1.1"]
    assert create_molf_optimizer(Nested(), TWO).routed_modules == ["dense"]


class Headless(nn.Linear):
    def get_output_embeddings(self):
        raise NotImplementedError


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_model_inside_is_not_routed(tied: bool) -> None:
    """As Lightning and DataParallel wrap it; some parts of transformers' models raise when they are asked."""
    wrapper = nn.DataParallel(causal_lm("llama", tie_word_embeddings=tied))
    wrapper.vision = Headless(4, 4)
    names = create_molf_optimizer(wrapper, TWO).routed_modules
    assert len(names) == 15
    assert "module.lm_head" not in names
    assert "vision" in names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: torch.nn.utils.parametrizations.weight_norm(m[0]), r"0\.weight is computed by a parametrization"),
        (lambda m: torch.nn.utils.parametrize.register_parametrization(m[0], "bias", nn.Softplus()),
         r"0\.bias is computed by a parametrization"),
        (lambda m: m.to("meta"), r"0\.weight has no values yet"),
        (lambda m: m.__setitem__(0, nn.LazyLinear(4)), r"0\.weight has no values yet"),
        (lambda m: m[0].__setattr__("weight", nn.Parameter(torch.zeros(0, 4))), r"0\.weight is empty, \(0, 4\)"),
        (lambda m: m[0].__setattr__("weight", nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), False)),
         r"0\.weight is quantised .*float8"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_trained_are_refused_by_name(change, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    change(model)
    with pytest.raises(ValueError, match=message):
        create_molf_optimizer(model, TWO)


def test_an_adapter_over_a_computed_weight_needs_a_frozen_base() -> None:
    def adapted(config: MoLFConfig) -> nn.Module:
        model = nn.Sequential()
        model.one = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        return get_peft_model(model, molf_lora_config(config))

    with pytest.raises(ValueError, match=r"one\.weight is computed by a parametrization"):
        create_molf_optimizer(adapted(MoLFConfig(expert_ranks=(2, 4))), MoLFConfig(expert_ranks=(2, 4)))
    model = adapted(EFFICIENT)
    with torch.nn.utils.parametrize.cached():
        model.base_model.model.one.base_layer.requires_grad_(True)(torch.ones(4))  # kept, and no leaf
        optimizer = create_molf_optimizer(model, EFFICIENT)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model.base_model.model.one.lora_B.default.weight.any()
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name)


def test_an_adapter_without_values_is_refused_by_name() -> None:
    model = get_peft_model(causal_lm("llama"), molf_lora_config(EFFICIENT), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight has no values yet"):
        create_molf_optimizer(model, EFFICIENT)


def test_after_a_merge_the_remedy_is_named_and_works() -> None:
    model = get_peft_model(causal_lm("llama"), molf_lora_config(EFFICIENT)).merge_and_unload()
    with pytest.raises(ValueError, match=r"that is not frozen: .* requires_grad_\(True\)"):
        create_molf_optimizer(model, TWO)
    assert len(create_molf_optimizer(model.requires_grad_(True), TWO).routed_modules) == 14


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys", "ignore:You have passed exclude_")
@pytest.mark.parametrize("excluded", [None, ["gate", "experts"]])
def test_adapters_of_3d_experts_are_refused_with_the_remedy(excluded) -> None:
    """PEFT makes parameters of the experts targets, which its ``exclude_modules`` do not reach."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = {"expert_ranks": (2, 4), "train_base": False, "exclude_modules": excluded}

    def adapted(config: MoLFConfig) -> nn.Module:
        model = MixtralForCausalLM(MixtralConfig(vocab_size=67, num_key_value_heads=2, num_local_experts=2, **sizes))
        return get_peft_model(model, molf_lora_config(config))

    config = MoLFConfig(**settings)
    with pytest.raises(ValueError, match=r"only linear layers can be routed; .* name linear layers in target_modules"):
        create_molf_optimizer(adapted(config), config)
    named = MoLFConfig(**settings, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert len(create_molf_optimizer(adapted(named), named).routed_modules) == 4


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.spectrum = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"^spectrum is torch\.complex64, and complex .*requires_grad_\(False\)"):
        create_molf_optimizer(model, TWO)
    model.spectrum.requires_grad_(False)
    assert create_molf_optimizer(model, TWO).routed_modules == ["0"]
    with pytest.raises(ValueError, match=r"^0\.weight is torch\.complex64, and complex"):
        create_molf_optimizer(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), TWO)


def test_unsupported_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="amsgrad=True: MoLF has no such option"):
        create_molf_optimizer(causal_lm("llama"), TWO, amsgrad=True)
    with pytest.raises(ValueError, match="fused=True"):
        MoLFOptimizerFactory()(causal_lm("llama"), config=TWO, fused=True)
    with pytest.raises(ValueError, match=r"nothing would be routed; make it by create_molf_optimizer"):
        MoLFAdamW(causal_lm("llama").parameters(), TWO)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "'default' is of type IA3"),
        (LoraConfig(r=6, target_modules=["q_proj"], bias="all"), "bias='all'"),
    ],
)
def test_other_adapters_are_refused_by_name(adapter, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_molf_optimizer(get_peft_model(causal_lm("qwen2"), adapter), EFFICIENT)


def test_what_peft_was_asked_to_train_still_trains() -> None:
    model = get_peft_model(causal_lm("llama"), molf_lora_config(EFFICIENT, trainable_token_indices=[1, 2]))
    asked = [name for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    create_molf_optimizer(model, EFFICIENT)
    assert asked
    assert all(model.get_parameter(name).requires_grad for name in asked)
    with pytest.raises(ValueError, match="bias: set by the experts"):
        molf_lora_config(EFFICIENT, bias="all")
    with pytest.raises(ValueError, match=r"lora_dropout=0\.5, but the adapter .* has 0\.0"):
        create_molf_optimizer(model, MoLFConfig(expert_ranks=(2, 4), train_base=False, lora_dropout=0.5))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        create_molf_optimizer(model, EFFICIENT)


@pytest.mark.parametrize("train_base", [False, True])
def test_an_idle_adapter_stays_as_it_is(train_base: bool) -> None:
    """TRL keeps its reference so; the superposed form trains everything else."""
    config = MoLFConfig(expert_ranks=(2, 4), train_base=train_base, lr=1e-3, lora_lr=1e-3)
    model = get_peft_model(causal_lm("llama"), molf_lora_config(config))
    model.add_adapter("ref", molf_lora_config(config))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_molf_optimizer(model, config)
    assert not [name for group in optimizer.param_groups for name in group["param_names"] if ".ref." in name]
    lm_step(model, optimizer, 0)
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            assert not parameter.requires_grad
            assert torch.equal(parameter, before[name])
        elif "lora_B" in name:
            assert torch.equal(parameter, before[name]) == (train_base and not parameter.any())


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize(
    "asked",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_what_an_adapter_trains_by_name_trains_while_it_is_active(tmp_path, asked, train_base: bool) -> None:
    """``PeftModel.from_pretrained`` freezes all of an adapter unless it is asked for ``is_trainable=True``."""
    adapter = LoraConfig(**{"r": 6, "target_modules": ["q_proj"], **asked})
    get_peft_model(causal_lm("llama"), adapter).save_pretrained(tmp_path, save_embedding_layers=False)
    model = PeftModel.from_pretrained(causal_lm("llama"), tmp_path)
    model.load_adapter(tmp_path, "ref")
    config = MoLFConfig(expert_ranks=(2, 4), train_base=train_base, lr=1e-3, lora_lr=1e-3)
    optimizer = create_molf_optimizer(model, config)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    own = [name for name, _ in model.named_parameters() if ".default" in name and "q_proj" not in name]
    assert own
    assert names >= set(own)
    assert not [name for name in names if ".ref" in name]
    assert not [name for name, p in model.named_parameters() if ".ref" in name and p.requires_grad]


def test_a_frozen_bias_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].bias.requires_grad_(False)
    create_molf_optimizer(model, TWO)
    assert not model[0].bias.requires_grad


def test_weights_loaded_through_data_before_the_first_step_are_not_undone() -> None:
    """No version counter tells of ``parameter.data.copy_``."""
    model, other = causal_lm("llama", torch.bfloat16), causal_lm("llama", torch.bfloat16)
    optimizer = create_molf_optimizer(model, TWO)
    for parameter, loaded in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(loaded.data + 1)
    with pytest.raises(RuntimeError, match="was changed since the optimizer was made"):
        lm_step(model, optimizer, 0)


@pytest.mark.parametrize("group_added", [False, True])
def test_weights_loaded_before_the_state_is_loaded_into_itself_are_not_undone(group_added: bool) -> None:
    """accelerate does that when it prepares an optimizer, and the weights were rewritten without a word."""
    model, other = causal_lm("llama", torch.bfloat16), causal_lm("llama", torch.bfloat16)
    optimizer = create_molf_optimizer(model, TWO)
    if group_added:
        optimizer.add_param_group({"params": nn.Linear(2, 2).bfloat16().parameters()})
    model.load_state_dict({name: tensor + 1 for name, tensor in other.state_dict().items()})
    for _ in range(2):  # as by two Accelerators
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="was changed since the optimizer was made"):
        lm_step(model, optimizer, 0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("names", [("model", "optimizer"), ("weights", "optimizer")])
def test_a_checkpoint_is_loaded_in_place_in_any_order(tmp_path, names: tuple[str, str]) -> None:
    """As torch's distributed checkpoint does, by name: W was the weight itself, and the later of P and W both."""
    saved, loaded = (dict(zip(names, _pair(), strict=True)) for _ in range(2))
    for step in range(3):
        lm_step(*saved.values(), step)
    dcp.save({name: each.state_dict() for name, each in saved.items()}, checkpoint_id=tmp_path, no_dist=True)
    states = {name: each.state_dict() for name, each in loaded.items()}
    dcp.load(states, checkpoint_id=tmp_path, no_dist=True)
    for name, each in loaded.items():
        each.load_state_dict(states[name])
    for step in range(3, 5):
        lm_step(*saved.values(), step)
        lm_step(*loaded.values(), step)
    for a, b in zip(*(each[names[0]].parameters() for each in (saved, loaded)), strict=True):
        assert torch.equal(a, b)


def _pair() -> tuple[nn.Module, MoLFAdamW]:
    model = causal_lm("llama")
    return model, create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), policy="fixed-lora"))


def test_a_tensor_of_another_shape_changes_nothing() -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    lm_step(model, optimizer, 0)
    norm, before = model.model.norm.weight, copy.deepcopy(optimizer.state_dict()["state"])
    shape = norm.shape[0]
    norm.data = torch.ones(shape + 1)
    norm.grad = torch.ones(shape + 1)
    for name, parameter in model.named_parameters():
        if name != "model.norm.weight":
            parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=rf"model\.norm\.weight is \({shape + 1},\) now and was \({shape},\)"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_an_optimizer_under_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=r"torch\.inference_mode\(\): make it outside"):
        create_molf_optimizer(causal_lm("llama"), TWO)


@pytest.mark.parametrize("ranks", [(), (128,)])
def test_a_gradient_whose_square_is_beyond_float_is_not_finite(ranks: tuple[int, ...]) -> None:
    """Uncompiled, too; v was infinite from then on."""
    model = nn.Sequential(nn.Linear(256, 256, bias=False))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=ranks, compile=False))
    model[0].weight.grad = torch.ones(256, 256)
    model[0].weight.grad[3, 5] = 1e21
    with pytest.raises(NonFiniteGradientError, match="nothing was updated"):
        optimizer.step()
    assert not optimizer.state[model[0].weight]["exp_avg_sq"].any()


def test_several_processes_may_skip_a_step_but_not_the_first(monkeypatch) -> None:
    """Which without gradients is one of a model that was sharded too late."""
    monkeypatch.setattr("molf.optim.molf_adamw.processes", lambda: 2)
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    with pytest.raises(RuntimeError, match="was the model sharded after its optimizer was made"):
        optimizer.step()
    lm_step(model, optimizer, 0)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="no parameter of this optimizer has a gradient"):
        optimizer.step()
    assert optimizer.steps_taken == 1


def test_weights_that_are_nan_are_no_change() -> None:
    """What is wrong with such a model is said of its gradients."""
    model = causal_lm("llama", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    optimizer = create_molf_optimizer(model, TWO)
    with pytest.raises(NonFiniteGradientError):
        lm_step(model, optimizer, 0)


@pytest.mark.parametrize("expert", ["dense", "lora_r2"])
def test_a_group_that_would_never_move_is_refused(expert: str) -> None:
    """Experts' groups are the modules'; what is added later is in none of them."""
    optimizer = create_molf_optimizer(causal_lm("llama"), MoLFConfig(expert_ranks=(2,)))
    with pytest.raises(ValueError, match=f"expert='{expert}': choose one of other, other_no_decay"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "expert": expert})


@pytest.mark.parametrize("policy", ["fixed-lora", "fixed-dense"])
def test_a_weight_in_another_tensor_is_taken_with_the_same_content_only(policy: str) -> None:
    """``weight.data = other`` moves no version counter."""
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), policy=policy))
    lm_step(model, optimizer, 0)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.clone()
    lm_step(model, optimizer, 1)
    weight.data = weight.data * 2
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj was changed since"):
        lm_step(model, optimizer, 2)
    assert torch.equal(before, weight)
    optimizer.zero_grad()
    optimizer.sync_weights()
    assert torch.equal(2 * weight, before)
    lm_step(model, optimizer, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_changed_behind_the_optimizer_are_not_overwritten(dtype: torch.dtype) -> None:
    model = causal_lm("llama", dtype)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), policy="fixed-lora"))
    lm_step(model, optimizer, 0)
    saved = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved)  # the same content: nothing is wrong
    lm_step(model, optimizer, 1)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj was changed since"):
        lm_step(model, optimizer, 2)
    assert torch.equal(before, model.model.layers[1].mlp.up_proj.weight)
    optimizer.zero_grad()
    optimizer.sync_weights()
    lm_step(model, optimizer, 2)


@pytest.mark.parametrize(("dtype", "change"), [(torch.float32, 1 + 2**-12), (torch.bfloat16, 1 + 2**-7)])
def test_products_in_another_order_are_no_change(dtype: torch.dtype, change: float) -> None:
    """P as it was written compiled, or elsewhere, is not what torch makes of it here, bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).to(dtype)
    config = MoLFConfig(expert_ranks=(16,), policy="fixed-lora", lora_lr=0.1, compile=False)
    optimizer = create_molf_optimizer(model, config)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, 64, dtype=dtype)).square().sum().backward()
        optimizer.step()

    step()
    step()
    different = 0
    for layer in model:
        state = optimizer.state[layer.weight]
        exact = state["base"].double() + 2 * state["lora_B"].double() @ state["lora_A"].double()
        different += int((exact.to(dtype) != layer.weight).sum())
        layer.weight.data = exact.to(dtype)
    assert different > 0
    step()
    with torch.no_grad():
        model[2].weight[3, 5] *= change
    with pytest.raises(RuntimeError, match="2 was changed since"):
        step()


def test_weights_loaded_before_a_lora_expert_won_are_taken() -> None:
    """W is the weight itself until then: there is no other copy that the step could return to."""
    model, other = causal_lm("llama"), causal_lm("llama")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,), policy="fixed-dense"))
    lm_step(model, optimizer, 0)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert optimizer.state[weight]["base"].data_ptr() == weight.data_ptr()
    model.load_state_dict(other.state_dict())
    lm_step(model, optimizer, 1)
    assert torch.equal(optimizer.state[weight]["base"], weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)


def test_loading_a_state_brings_the_weights_with_it() -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    for step in range(3):
        lm_step(model, optimizer, step)
    other = causal_lm("llama")
    create = create_molf_optimizer(other, TWO)
    create.load_state_dict(optimizer.state_dict())
    layer = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(layer), other.get_parameter(layer))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_in_float16_has_no_rounding_that_spares_masters(steps: int) -> None:
    model = causal_lm("llama", torch.bfloat16)
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(), keep_base=False))
    for step in range(steps):
        lm_step(model, optimizer, step)
    model.half()
    with pytest.raises(RuntimeError, match=r"is torch\.float16 now: convert the model before"):
        lm_step(model, optimizer, 0)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_converted_model_is_noticed(steps: int) -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=()))
    for step in range(steps):
        lm_step(model, optimizer, step)
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"is torch\.bfloat16 now: convert the model before"):
        lm_step(model, optimizer, 0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_go_on_alike(duplicate) -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    lm_step(model, optimizer, 0)
    twin, twin_optimizer = duplicate((model, optimizer))
    assert twin_optimizer.routing == optimizer.routing
    for step in (1, 2):
        assert lm_step(model, optimizer, step) == lm_step(twin, twin_optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_groups_added_later_train_as_adamw() -> None:
    optimizer = create_molf_optimizer(nn.Sequential(nn.Linear(4, 4)), TWO)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": extra, "lr": 0.1})
    extra.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.9))
    optimizer.add_param_group({"params": nn.LayerNorm(3).named_parameters()})
    assert optimizer.param_groups[-1]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="expert='dens': choose one of"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "expert": "dens"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": "5e-5"}, "lr='5e-5': must be a number"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1'"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"expert_ranks": None}, "expert_ranks=None"),
        ({"target_modules": None}, "target_modules=None"),
        ({"lora_alpha": "32"}, "lora_alpha='32'"),
        ({"top_k": True}, "top_k=True"),
        ({"train_other": "no"}, "train_other='no': must be True or False"),
    ],
)
def test_types_are_checked_by_name(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoLFConfig(**fields)


def test_hooks_on_load_state_dict_change_and_see_what_is_loaded() -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    lm_step(model, optimizer, 0)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    lm_step(model, optimizer, 1)

    def changed(_, state_dict):
        seen.append(len(state_dict["state"]))
        first = {**state_dict["state"][0], "exp_avg": torch.zeros_like(state_dict["state"][0]["exp_avg"])}
        return {**state_dict, "state": {**state_dict["state"], 0: first}}

    optimizer.register_load_state_dict_pre_hook(changed)
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(loaded.steps_taken))
    optimizer.load_state_dict(saved)
    first = optimizer.param_groups[0]["params"][0]
    assert seen == [len(saved["state"]), 1]
    assert not optimizer.state[first]["exp_avg"].any()
    assert torch.equal(optimizer.state[first]["exp_avg_sq"], saved["state"][0]["exp_avg_sq"])


def test_a_state_is_loaded_where_a_scheduler_was_made_since() -> None:
    """It keeps the initial rate in every group."""
    optimizer = create_molf_optimizer(nn.Sequential(nn.Linear(4, 4)), TWO)
    saved = copy.deepcopy(optimizer.state_dict())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in saved["param_groups"]]


def test_a_damaged_state_is_refused() -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    lm_step(model, optimizer, 0)
    good = optimizer.state_dict()
    for change, message in (
        (lambda s: s["param_groups"][0].pop("lr"), r"lacks \['lr'\]"),
        (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"].double()), "is torch.float64"),
        (lambda s: s["state"][0].update(exp_avg=s["state"][0]["exp_avg"] * torch.nan), "is not finite"),
    ):
        broken = copy.deepcopy(good)
        change(broken)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(broken)


def test_recorder_never_destroys_a_file(tmp_path) -> None:
    model = causal_lm("llama")
    optimizer = create_molf_optimizer(model, TWO)
    (tmp_path / "precious.txt").write_text("mine\n")
    with pytest.raises(ValueError, match="is no routing log"):
        RoutingRecorder(optimizer, tmp_path / "precious.txt")
    for _ in range(2):
        recorder = RoutingRecorder(create_molf_optimizer(model, TWO), tmp_path / "r.jsonl")
        lm_step(model, recorder.optimizer, 0)
        recorder.close()
    assert len(read_routing(tmp_path / "r.jsonl.old")[1]) == 1
    recorder = RoutingRecorder(optimizer, tmp_path / "r.jsonl")  # made before the state is loaded
    optimizer.load_state_dict(create_molf_optimizer(causal_lm("llama"), TWO).state_dict())
    recorder.close()
    assert len(read_routing(tmp_path / "r.jsonl")[1]) == 1


def test_a_module_that_is_frozen_in_part_is_refused() -> None:
    """Its experts would no longer be compared over what they train."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6))
    optimizer = create_molf_optimizer(model, MoLFConfig(expert_ranks=(2,)))
    model[0].bias.requires_grad_(False)
    model(torch.randn(3, 6)).square().mean().backward()
    with pytest.raises(
        RuntimeError, match=r"0: some of its weight, bias and adapter have a gradient and some have none"
    ):
        optimizer.step()
