from __future__ import annotations

import copy
import io
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_patch import anatomy
from tiny_models import features, tiny_huggingface
from torch import Tensor, nn

import fastast
from fastast.checkpoints import CheckpointError

transformers = pytest.importorskip("transformers", "5.10")


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def old_name(name: str) -> str:
    """A state-dict key as transformers up to 5.6 spelled it."""
    name = name.replace(".layers.", ".encoder.layer.")
    for new, old in (
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(new, old)
    return name


def save_as(model: nn.Module, path: Path, names: Any = str) -> dict[str, Tensor]:
    """Write the weights under chosen names; which ones the library writes has changed."""
    state = {names(name): value.clone() for name, value in model.state_dict().items()}
    save_file(state, path)
    return state


def run(model: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    """Logits, or what a model without a head has in their place."""
    out = model(x, **kwargs)
    return out.logits if hasattr(out, "logits") else out.pooler_output


# ----------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("layout", ["new", "old", "pickle", "sharded"])
def test_folders_give_the_same_logits(tmp_path: Path, layout):
    model, x = tiny_huggingface(layer_norm_eps=1e-12), features(3)
    if layout == "sharded":
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    else:
        model.save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        state = save_as(model, weights, old_name if layout in ("old", "pickle") else str)
        old = "audio_spectrogram_transformer.encoder.layer.2.output.dense.bias"
        assert (old in state) == (layout != "new")
    if layout == "pickle":
        torch.save(state, tmp_path / "pytorch_model.bin")
        weights.unlink()
    ours = fastast.AST.from_pretrained(tmp_path)
    assert ours.config.layer_norm_eps == ours.config.head_layer_norm_eps == 1e-12
    assert (ours.config.mlp_ratio, ours.config.labels) == (2.0, ())
    torch.testing.assert_close(ours(x), model(x).logits, atol=1e-4, rtol=0)


def test_labels_and_normalisation_come_along(tmp_path: Path):
    labels = dict(enumerate(["dog", "cat", "sea", "rain", "siren"]))
    model = tiny_huggingface(id2label=labels)
    model.save_pretrained(tmp_path)
    extractor = {"mean": -6.8, "std": 5.5, "sampling_rate": 8000, "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(extractor))
    config = fastast.AST.from_pretrained(tmp_path).config
    assert config.labels == tuple(labels.values())
    assert (config.mean, config.std, config.sample_rate) == (-6.8, 5.5, 8000)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**extractor, "do_normalize": False})
    )
    config = fastast.AST.from_pretrained(tmp_path).config
    assert (config.mean, 2 * config.std) == (0, 1)


def test_ast_model_without_a_head(tmp_path: Path):
    model, x = tiny_huggingface(with_head=False), features()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no classification head: give num_classes"):
        fastast.AST.from_pretrained(tmp_path)
    ours = fastast.AST.from_pretrained(tmp_path, num_classes=3)
    assert ours(x).shape == (2, 3)
    torch.testing.assert_close(
        ours.forward_features(x), model(x).last_hidden_state, atol=1e-4, rtol=0
    )


def test_no_qkv_bias_is_a_bias_of_zero(tmp_path: Path):
    model, x = tiny_huggingface(qkv_bias=False), features()
    model.save_pretrained(tmp_path)
    ours = fastast.AST.from_pretrained(tmp_path)
    assert not ours.blocks[0].attn.qkv.bias.any()
    torch.testing.assert_close(ours(x), model(x).logits, atol=1e-4, rtol=0)


def test_folders_that_do_not_fit(tmp_path: Path):
    model = tiny_huggingface()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"patch_size": [16, 8]}, "patch_size must be an int"),
        ({"num_hidden_layers": 4}, r"missing blocks\.3\."),
        ({"intermediate_size": 256}, "wrong shape"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match=message):
            fastast.AST.from_pretrained(tmp_path)
    path.write_text(json.dumps(good))
    weights = tmp_path / "model.safetensors"
    save_as(model, weights, lambda name: name.replace("1.attention.k_proj", "1.attention.key"))
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.attn\.qkv.* unexpected"):
        fastast.AST.from_pretrained(tmp_path)


def test_shards_stay_in_their_folder(tmp_path: Path):
    tiny_huggingface().save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("../model.safetensors", "gone.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError, match=re.escape(f"names '{shard}', which is not in")):
            fastast.AST.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------- patching


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prop_attn", [True, False], ids=["prop", "plain"])
@pytest.mark.parametrize("r", [0, 2, 5, (4, -1.0), [0, 6, 0]], ids=str)
def test_patched_logits_are_those_of_our_ast(tmp_path: Path, attention, prop_attn, r):
    model, x = tiny_huggingface(layer_norm_eps=1e-6), features()
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path)
    ours = fastast.AST.from_pretrained(tmp_path)
    for each in (model, ours):
        fastast.patch(each, r=r, prop_attn=prop_attn, trace=True)
    torch.testing.assert_close(model(x).logits, ours(x), atol=1e-4, rtol=0)
    assert model.tome.source.dtype == torch.int32
    assert torch.equal(model.tome.source, ours.tome.source)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("with_head", [True, False])
def test_r_zero_is_bit_for_bit_the_unpatched_model(attention, with_head):
    model, x = tiny_huggingface(with_head=with_head), features()
    model.set_attn_implementation(attention)
    plain = run(model, x)
    assert fastast.patch(model, trace=True) is model
    assert torch.equal(run(model, x), plain)
    assert torch.equal(model.tome.source, torch.arange(38).int().repeat(2, 1))
    model.r = 5
    assert not torch.equal(run(model, x), plain)
    model.r = 0
    assert torch.equal(run(model, x), plain)


@pytest.mark.parametrize("with_head", [True, False])
def test_unpatch_restores_everything(tmp_path: Path, with_head):
    model, x = tiny_huggingface(with_head=with_head), features()
    before, plain, keys = anatomy(model), run(model, x), list(model.state_dict())
    config = model.config.to_dict()
    fastast.patch(model, r=9, prop_attn=False, trace=True)
    fastast.patch(model, r=4)
    once = fastast.patch(tiny_huggingface(with_head=with_head), r=4)
    assert torch.equal(run(model, x), run(once, x))
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, x), plain)

    assert fastast.unpatch(model) is model
    assert anatomy(model) == before
    assert not hasattr(model, "r")
    assert torch.equal(run(model, x), plain)
    fastast.unpatch(model)
    with fastast.patched(model, r=3):
        assert not torch.equal(run(model, x), plain)
    assert anatomy(model) == before


def test_patching_the_inner_model_replaces_the_patch_of_the_outer():
    model, x = tiny_huggingface(), features()
    before = anatomy(model)
    fastast.patch(model, r=9)
    inner = fastast.patch(model.audio_spectrogram_transformer, r=4)
    assert not hasattr(model, "r")
    assert torch.equal(model(x).logits, fastast.patch(tiny_huggingface(), r=4)(x).logits)
    assert inner.r == 4
    fastast.unpatch(model)
    assert anatomy(model) == before


def test_an_earlier_forward_on_the_instance_is_kept():
    """Other libraries, accelerate for one, also put a forward on the layer."""
    model, x = tiny_huggingface(), features()
    layer = model.audio_spectrogram_transformer.layers[1]
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = counted
    before = anatomy(model)
    fastast.patch(model, r=[4, 0, 0])
    model(x)
    assert len(calls) == 1
    fastast.unpatch(model)
    assert anatomy(model) == before


def test_other_models_with_the_same_config_are_left_alone():
    first, x = tiny_huggingface(), features()
    second = transformers.ASTForAudioClassification(first.config).eval()
    second.load_state_dict(first.state_dict())
    plain = second(x).logits
    fastast.patch(first, r=6)
    assert torch.equal(second(x).logits, plain)
    assert first.config._attn_implementation == "sdpa"


def test_wrong_r():
    model, x = tiny_huggingface(), features()
    before = anatomy(model)
    with pytest.raises(ValueError, match="one int a block, 3 for this model, got 2"):
        fastast.patch(model, r=[1, 2])
    assert anatomy(model) == before
    fastast.patch(model, r=2)
    model.r = 2.5
    with pytest.raises(TypeError, match=r"got 2\.5"):
        model(x)
    model.r = -1
    with pytest.raises(ValueError, match="r must be 0 or more, got -1"):
        model(x)


def test_a_mask_and_merging_exclude_each_other():
    model, x = fastast.patch(tiny_huggingface(), r=2), features()
    mask = torch.ones(2, 38)
    with pytest.raises(ValueError, match="attention_mask must be None where tokens are merged"):
        model(x, attention_mask=mask)
    model.r = 0
    assert torch.equal(
        model(x, attention_mask=mask).logits,
        fastast.unpatch(model)(x, attention_mask=mask).logits,
    )


def test_models_of_an_old_transformers_are_refused_by_name():
    model = nn.Module()
    model.embeddings = nn.Module()
    model.embeddings.cls_token = model.embeddings.distillation_token = nn.Parameter(torch.zeros(1))
    model.encoder = nn.Module()
    with pytest.raises(TypeError, match=r"needs transformers 5\.10 or newer"):
        fastast.patch(model)


def test_other_transformers_models_are_refused():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16
    )
    with pytest.raises(TypeError, match="got ViTModel"):
        fastast.patch(transformers.ViTModel(config))


# ------------------------------------------------------------------------ the library's features


def test_hidden_states_and_attentions():
    model, x = fastast.patch(tiny_huggingface(), r=4), features()
    logits = model(x).logits
    out = model(x, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [38, 34, 30, 26]
    assert torch.equal(out.logits, logits)

    model.set_attn_implementation("eager")
    out = model(x, output_attentions=True)
    assert [a.shape for a in out.attentions] == [(2, 2, n, n) for n in (38, 34, 30)]
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)
    for attention in out.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    model(x, labels=torch.tensor([1, 4])).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_changes_no_gradient(reentrant, dropout):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = fastast.patch(tiny_huggingface(**rates), r=(4, -0.5), trace=True).train()
    plain, source = _gradients(model, features()), model.tome.source
    assert len(plain) == len(list(model.parameters()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for again, grad in zip(_gradients(model, features()), plain, strict=True):
        assert torch.equal(again, grad)
    assert torch.equal(model.tome.source, source)


def test_gradients_are_those_of_our_ast(tmp_path: Path):
    model = fastast.patch(tiny_huggingface(layer_norm_eps=1e-6), r=4)
    model.save_pretrained(tmp_path)
    ours = fastast.patch(fastast.AST.from_pretrained(tmp_path), r=4)
    model(features()).logits.square().sum().backward()
    ours(features()).square().sum().backward()
    theirs = model.audio_spectrogram_transformer
    key = theirs.layers[0].attention.k_proj.weight.grad
    for grad, wanted in (
        (theirs.embeddings.position_embeddings.grad, ours.pos_embed.grad),
        (theirs.layers[1].layernorm_after.weight.grad, ours.blocks[1].norm2.weight.grad),
        (key, ours.blocks[0].attn.qkv.weight.grad[64:128]),
    ):
        torch.testing.assert_close(grad, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("trace", [False, True])
def test_compiles_into_one_graph_and_only_once(trace):
    torch._dynamo.reset()
    model, x = fastast.patch(tiny_huggingface(), r=(4, -0.5), trace=trace), features()
    eager, source = model(x).logits, model.tome.source
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).logits, eager)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x).logits, eager)
    if trace:
        assert torch.equal(model.tome.source, source)
    model.r = 2
    torch.testing.assert_close(compiled(x).logits, model(x).logits)


def test_two_threads_share_a_model():
    model = fastast.patch(tiny_huggingface(), r=5)
    inputs = [features(seed=seed) for seed in range(2)]
    got: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        with torch.no_grad():
            got[i] = [model(inputs[i]).logits for _ in range(10)]

    with torch.no_grad():
        wanted = [model(x).logits for x in inputs]
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert len(got[i]) == 10
        assert all(torch.equal(logits, wanted[i]) for logits in got[i])


@pytest.mark.parametrize("with_head", [True, False])
def test_copies_and_pickles_are_patched_models_of_their_own(with_head):
    model, x = fastast.patch(tiny_huggingface(with_head=with_head), r=5), features()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    wanted = run(model, x)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(run(twin, x), wanted)
        twin.r, twin.tome.trace = 0, True
        assert not torch.equal(run(twin, x), wanted)
        assert torch.equal(run(model, x), wanted)
        assert model.tome.source is None
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert torch.equal(run(model, x), wanted)
        fastast.unpatch(twin)
        assert not hasattr(twin, "r")
        assert not any("forward" in vars(m) for m in twin.modules())


def test_autocast_is_close():
    model, x = fastast.patch(tiny_huggingface(), r=4), features()
    exact = model(x).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x).logits
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
