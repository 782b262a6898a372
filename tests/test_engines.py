"""The engines that FastAST is timed against compute the model they were given, and only that."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import features, tiny_huggingface
from torch import Tensor

import fastast

transformers = pytest.importorskip("transformers", "5.10")
sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
engines: Any = importlib.import_module("engines")

# Of the norm of the logits, for a two-layer model: what the dtype costs, with room for chips.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.1}
EVERY_CPU_ENGINE = pytest.mark.parametrize(
    ("name", "dtype"), engines.CPU_ENGINES, ids=["-".join(pair) for pair in engines.CPU_ENGINES]
)


def tiny(seed: int = 0) -> Any:
    return tiny_huggingface(seed, num_hidden_layers=2)


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x).logits


def truth(model: Any, x: Tensor) -> Tensor:
    return logits(copy.deepcopy(model).double(), x.double())


def error(out: Tensor, exact: Tensor) -> float:
    assert out.dtype == torch.float32 and out.shape == exact.shape
    return float((out - exact).norm() / exact.norm())


def skip_unless(name: str, dtype: str) -> None:
    if reason := engines.why_not(name, dtype, "cpu"):
        pytest.skip(reason)


@pytest.fixture
def unchanged() -> Iterator[Any]:
    """A model, which must come out of the test as it went in."""
    model, x = tiny(), features(2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, attention = logits(model, x), model.config._attn_implementation
    yield model
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model, x), before)
    assert model.config._attn_implementation == attention


@EVERY_CPU_ENGINE
def test_engine(name: str, dtype: str, unchanged: Any) -> None:
    skip_unless(name, dtype)
    forward = engines.build(name, dtype, unchanged, features(2), threads=1)
    for seed in (1, 2):  # not only the example it was built with
        x = features(2, seed)
        assert error(forward(x), truth(unchanged, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", engines.DTYPES)
@pytest.mark.parametrize("attention", ["materialised", "sdpa"])
def test_published_is_the_model_where_nothing_is_merged(
    attention: str, dtype: str, unchanged: Any
) -> None:
    skip_unless("published", dtype)
    x = features(2)
    forward = engines.build_published(unchanged, [0, 0], attention, dtype, x, False, 1)
    assert error(forward(x), truth(unchanged, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("schedule", "attention", "compiled"),
    [
        ([7, 4], "materialised", False),
        ([7, 4], "sdpa", False),
        ([9, 0], "materialised", False),
        ([50, 50], "sdpa", False),
        ([7, 4], "materialised", True),
    ],
)
def test_published_merges_as_fastast_does(
    schedule: list[int], attention: str, compiled: bool
) -> None:
    if compiled:
        skip_unless("hf_compile", "float32")
    model, x = tiny(), features(2)
    forward = engines.build_published(model, schedule, attention, "float32", x, compiled, 1)
    out = [forward(x), forward(x)]  # the second call must know nothing of the first
    assert torch.equal(*out)
    assert error(out[0], truth(model, x)) > 1e-3
    fastast.patch(model, r=schedule)
    torch.testing.assert_close(out[0], logits(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["materialised", "sdpa"])
def test_published_in_bf16_is_near_fp32(attention: str) -> None:
    skip_unless("published", "bfloat16")
    model, x = tiny(), features(2)
    exact = fastast.patch(copy.deepcopy(model), r=[9, 0])
    forward = engines.build_published(model, [9, 0], attention, "bfloat16", x, False, 1)
    # Rounded keys pair a few tokens otherwise, so no bound on rounding alone holds.
    assert error(forward(x), logits(exact, x).double()) < 0.1


def test_compiled_models_are_kept_apart() -> None:
    """Same code, same shapes, other weights; and more of them than Dynamo compiles of one code."""
    skip_unless("hf_compile", "bfloat16")
    x, models = features(2), [tiny(seed) for seed in range(2)]
    with torch._dynamo.config.patch(recompile_limit=1):
        built = [engines.build("hf_compile", "bfloat16", model, x, 1) for model in models]
    for model, forward in zip(models, built, strict=True):
        assert error(forward(x), truth(model, x)) < TOLERANCE["bfloat16"]


def test_stride16() -> None:
    model = tiny()
    coarse = engines.build_stride16(model, "float32")
    x = features(2)
    tokens = coarse.audio_spectrogram_transformer(x).last_hidden_state.shape[1]
    assert tokens == 2 + (48 // 16) * (96 // 16)
    forward = engines.build("hf_eager", "float32", coarse, x, 1)
    assert error(forward(x), truth(coarse, x)) < TOLERANCE["float32"]
    assert engines.build_stride16(model, "bfloat16").dtype == torch.bfloat16
    positions = "audio_spectrogram_transformer.embeddings.position_embeddings"
    state, old = coarse.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], old[name]) for name in state if name != positions)
    corners = [0, 1, 2, -1]  # CLS, DIST, the first patch and the last one
    torch.testing.assert_close(state[positions][:, corners], old[positions][:, corners])


def test_what_does_not_exist_is_said() -> None:
    x = features(1)
    with pytest.raises(ValueError, match=r"engine must be one of hf_eager, .*, got 'tensorrt'"):
        engines.build("tensorrt", "float32", None, x, 1)
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got 'fp8'"):
        engines.why_not("hf_sdpa", "fp8", "cpu")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        engines.why_not("hf_sdpa", "float32", "tpu")
    with pytest.raises(ValueError, match="schedule must have 2 entries, got 1"):
        engines.build_published(tiny(), [3], "sdpa", "float32", x, False, 1)
    with pytest.raises(ValueError, match="attention must be one of materialised, sdpa"):
        engines.build_published(tiny(), [3, 3], "flash", "float32", x, False, 1)
    with pytest.raises(RuntimeError, match="hf_sdpa in int8 cannot be built: hf_sdpa does not"):
        engines.build("hf_sdpa", "int8", tiny(), x, 1)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines.why_not("hf_sdpa", "float32", "cpu") is None
    assert engines.why_not("published", "int8", "cpu") == "published does not run in int8"
    assert "bf16" in engines.why_not("onnxruntime", "bfloat16", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engines.why_not("openvino", "float32", "cuda") == (
        "openvino in float32 is not an engine for cuda"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engines.why_not("hf_sdpa", "float32", "cuda") == "PyTorch finds no GPU"
    assert engines.why_not("hf_compile_max", "float32", "cpu") == (
        "hf_compile_max in float32 is not an engine for cpu"
    )
    monkeypatch.setattr(engines.exported.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "fastast[hf]"' in engines.why_not("hf_sdpa", "float32", "cpu")
    assert engines.exported.why_not("openvino", "int8") == (
        'openvino, nncf not installed: pip install "fastast[engines]"'
    )
