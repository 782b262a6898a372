"""fastast.optimize: what a graph of a forward must do, with CUDA graphs emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_ast, tiny_huggingface
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastast
from fastast import inference, streams

FEATURES = (2, 96, 48)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs that replay by running the call again, into the memory of the captured result."""
    log: list[str] = []

    def captured(function: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
        assert pool == "pool"
        log.append("capture")
        result = function()

        def replay() -> None:
            log.append("replay")
            for old, new in zip(
                pytree.tree_leaves(result), pytree.tree_leaves(function()), strict=True
            ):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, result

    monkeypatch.setattr(inference, "captured", captured)
    monkeypatch.setattr(inference, "_capturable", lambda leaves: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return log


def test_on_a_cpu_it_is_the_model() -> None:
    model = tiny_ast()
    x = torch.randn(FEATURES)
    expected = model(x).detach()
    optimized = fastast.optimize(fastast.patch(model))
    got = optimized(x)
    assert torch.equal(got, expected) and not got.requires_grad
    assert optimized.config is model.config and optimized.r == 0
    half = fastast.optimize(model, dtype=torch.bfloat16)
    assert half(x).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.bfloat16


def test_replays_what_the_model_says(graphs: list[str]) -> None:
    model = fastast.patch(tiny_ast(), r=4)
    optimized = fastast.optimize(model)
    kept = []
    for _ in range(4):
        x = torch.randn(FEATURES)
        kept.append((optimized(x), model(x).detach()))
    assert graphs == ["capture", "replay", "replay", "replay"]
    for got, expected in kept:  # each still has its own result: nothing was written over
        assert torch.equal(got, expected)


def test_captured_in_inference_mode_and_used_outside(graphs: list[str]) -> None:
    optimized = fastast.optimize(tiny_ast())
    x = torch.randn(FEATURES)
    with torch.inference_mode():
        first = [optimized(x) for _ in range(2)]
    assert torch.equal(optimized(x), first[0])
    assert graphs == ["capture", "replay", "replay"]


def test_a_graph_a_shape_and_schedule(graphs: list[str]) -> None:
    model = fastast.patch(tiny_ast(), r=4)
    optimized = fastast.optimize(model)
    x = torch.randn(FEATURES)
    for r in (4, 9, 4, 9):
        optimized.r = r
        assert model.r == r
        for batch in (x, x[:1]):
            for _ in range(2):
                assert torch.equal(optimized(batch), model(batch))
    assert graphs.count("capture") == 4
    fastast.patch(model, r=4, prop_attn=False)
    for _ in range(2):
        assert torch.equal(optimized(x), model(x))
    assert graphs.count("capture") == 5


def test_a_shape_that_comes_once_is_not_captured(graphs: list[str]) -> None:
    model = tiny_ast()
    optimized = fastast.optimize(model)
    for batch in range(1, 80):
        optimized(torch.zeros(batch, *FEATURES[1:]))
    assert graphs == [] and len(optimized._seen) <= inference.REMEMBERED_SHAPES


def test_few_graphs_are_kept(graphs: list[str]) -> None:
    model = tiny_ast()
    optimized = fastast.optimize(model, graphs=2)
    batches = [torch.randn(n, *FEATURES[1:]) for n in (1, 2, 3)]
    for x in batches:
        optimized(x), optimized(x)
    assert graphs.count("capture") == 3 and len(optimized._graphs) == 2
    optimized(batches[2])
    assert graphs.count("capture") == 3
    for _ in range(2):  # the first was forgotten, and the second is older than the third
        assert torch.equal(optimized(batches[0]), model(batches[0]))
    assert graphs.count("capture") == 4


def test_trace(graphs: list[str]) -> None:
    model = fastast.patch(tiny_ast(), r=4, trace=True)
    optimized = fastast.optimize(model)
    sources = []
    for _ in range(3):
        x = torch.randn(FEATURES)
        optimized(x)
        sources.append(optimized.tome.source)
        model(x)
        assert torch.equal(sources[-1], model.tome.source)
    assert not torch.equal(sources[1], sources[2])
    fastast.patch(model, r=4, trace=True)  # the same settings, another object
    optimized(x)
    assert torch.equal(model.tome.source, sources[-1])
    assert graphs.count("capture") == 1


def test_outputs_of_any_structure(graphs: list[str]) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
            return {"sum": (x + 1, scale), "name": "x"}

    optimized = fastast.optimize(Two())
    for scale in (1.0, 2.0):
        for _ in range(3):
            x = torch.randn(3)
            out = optimized(x, scale=scale)
            assert torch.equal(out["sum"][0], x + 1) and out["sum"][1] == scale
            assert out["name"] == "x"
    assert graphs.count("capture") == 2


def test_hugging_face(graphs: list[str]) -> None:
    pytest.importorskip("transformers")
    model = fastast.patch(tiny_huggingface(), r=3)
    optimized = fastast.optimize(model)
    config = model.config
    for _ in range(3):
        x = torch.randn(2, config.max_length, config.num_mel_bins)
        out = optimized(input_values=x)
        assert type(out).__name__ == "SequenceClassifierOutput"
        assert torch.equal(out.logits, model(input_values=x).logits)
    assert graphs == ["capture", "replay", "replay"]


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastast.optimize("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be a floating .* or None, got 'fp8'"):
        fastast.optimize(tiny_ast(), dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a floating .* or None, got torch\.int8"):
        fastast.optimize(tiny_ast(), dtype=torch.int8)
    with pytest.raises(ValueError, match="graphs must be 1 or more, got 0"):
        fastast.optimize(tiny_ast(), graphs=0)
    optimized = fastast.optimize(tiny_ast())
    with pytest.raises(RuntimeError, match="for inference only"):
        optimized.train()
    assert optimized.eval() is optimized
    assert fastast.optimize(optimized).module is optimized.module
    split = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="model must be on one device, got cpu, meta"):
        fastast.optimize(split)


class FakeStream:
    """A stream that writes down who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.device = name, log, torch.device("cuda", 0)

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"off {self.name}")


def test_a_branch_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    main, side = FakeStream("main", log), FakeStream("side", log)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(streams, "_side_stream", lambda device: side)

    def work() -> int:
        log.append("match")
        return 7

    beside = streams.Beside(work, torch.device("cuda", 0))
    log.append("attention")
    assert beside.result() == 7 == beside.result()
    assert log == [
        "side waits for main",
        "on side",
        "match",
        "off side",
        "attention",
        "main waits for side",
    ]


def test_no_branch_outside_a_capture() -> None:
    assert streams.Beside(lambda: 3, torch.device("cpu")).result() == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_graphs(dtype: torch.dtype) -> None:
    model = fastast.patch(tiny_ast(), r=4).cuda()
    optimized = fastast.optimize(model, dtype)
    for r in (4, 0, (3, -1.0)):
        optimized.r = r
        for _ in range(4):
            x = torch.randn(FEATURES, device="cuda")
            expected = model(x)
            assert torch.equal(optimized(x), expected)
    assert len(optimized._graphs) == 3
