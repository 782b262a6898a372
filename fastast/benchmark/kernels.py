"""Benchmark cases of the ops: fused, unfused, unfused and compiled, and what PyTorch has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch

import fastast_kernels as kernels
from fastast.benchmark import counts
from fastast.benchmark.case import TOLERANCE, Case, Config, Entry, relative_error
from fastast.benchmark.counts import Count
from fastast.benchmark.graphs import compiled, forget_compiled
from fastast_kernels import reference
from fastast_kernels.backends import GPU_BACKENDS, OPS, why_not
from fastast_kernels.testing import assert_valid_match

# Inputs of one case together, so that none is in a cache when its turn comes round again.
ROTATED_BYTES = {"cpu": 64e6, "cuda": 256e6}
MOST_SETS = 32

HEADS, HEAD_DIM, EPS = 12, 64, 1e-12

# Frames of a model's features for a clip of so many seconds.
FRAMES = {10: 1024, 5: 512, 1: 128}


def _sets(device: torch.device, draw: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """As many random sets of inputs as exceed the caches together; two at least."""
    torch.manual_seed(0)
    first = draw()
    size = sum(t.numel() * t.element_size() for t in first if isinstance(t, Tensor))
    number = max(2, min(MOST_SETS, int(ROTATED_BYTES[device.type] / max(size, 1)) + 1))
    return [first, *(draw() for _ in range(number - 1))]


def _dtype(config: Config) -> torch.dtype:
    return getattr(torch, str(config["dtype"]))


def _entries(
    providers: dict[str, Callable[..., Any]],
    config: Config,
    device: torch.device,
    compile_reference: bool,
    **shared: Any,
) -> list[Entry]:
    """An entry a provider, the reference's compiled twin, and on a GPU their graphs."""
    shared.setdefault("tolerance", TOLERANCE[_dtype(config)])
    entries = [Entry(name, call, **shared) for name, call in providers.items()]
    if compile_reference:
        forget_compiled()
        # An op by itself is one call already; of ours only a sequence of them has a compiled twin.
        twins = list(providers)[: 2 if config.get("C") and config.get("D") else 1]
        for name in twins:
            twin = compiled(providers[name], int(config.get("threads", 1)))
            entries.append(Entry(f"{name}+compile", twin, eager=False, **shared))
    if device.type == "cuda" and not shared.get("grad"):
        entries += [
            Entry(f"{e.provider}+graph", e.call, eager=False, graph=True, **shared) for e in entries
        ]
    return entries


def _backward(
    call: Callable[..., Any], which: tuple[int, ...]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """From an op, its backward pass as ``prepare`` and ``call`` of an entry.

    Args:
        call: the op; all its floating results get a random gradient.
        which: places of the arguments whose gradients are wanted.
    """

    def prepare(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves = [x.detach().requires_grad_() if i in which else x for i, x in enumerate(inputs)]
        results = call(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        outputs = [t for t in results if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        gradients = [
            torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outputs
        ]
        return outputs, [leaves[i] for i in which], gradients

    def backward(outputs: list[Tensor], leaves: list[Tensor], gradients: list[Tensor]) -> Any:
        return torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)

    return prepare, backward


def _on(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        with kernels.use_backend(backend):
            return call(*inputs)

    return run


# Ops that a case is made of, where it has another name.
_USED = {"match": ("bipartite_match",), "tome_step": ("bipartite_match", "merge")}


def _forced_backends(kernel: str, config: Config, device: torch.device) -> tuple[str, ...]:
    """The implementations to run by name, where a kernel has both of a GPU's.

    "fused" is the default, which may be either: who is faster can be told from these alone.
    """
    used = _USED.get(kernel, (kernel,))
    if device.type != "cuda" or not set(used) <= set(OPS):
        return ()
    for op in used:
        width = config.get("C" if op in ("bipartite_match", "match_keys") else "D")
        dim = None if width is None else int(width)
        if any(why_not(op, b, "cuda", _dtype(config), dim) for b in GPU_BACKENDS):
            return ()
    return GPU_BACKENDS


def _double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )


def _case(
    kernel: str,
    mode: str,
    config: Config,
    device: torch.device,
    providers: dict[str, Callable[..., Any]],
    draw: Callable[[], tuple[Any, ...]],
    count: Count,
    compile_reference: bool,
    which: tuple[int, ...] = (),
) -> Case:
    """A case whose first provider is the reference, in either direction."""
    first = next(iter(providers))
    truth: Callable[..., Any]
    forced = {f"fused {b}": b for b in _forced_backends(kernel, config, device)}
    providers |= {name: _on(backend, providers["fused"]) for name, backend in forced.items()}
    if mode == "forward":
        entries = _entries(providers, config, device, compile_reference, count=count)

        def truth(*inputs: Any) -> Any:
            return providers[first](*_double(inputs))

    else:
        # A graph that is kept for several backward passes cannot give its buffers away.
        functorch.donated_buffer = False
        entries = []
        if compile_reference:
            forget_compiled()
            twin = compiled(providers[first], int(config.get("threads", 1)))
            providers = {first: providers[first], f"{first}+compile": twin, **providers}
        for name, call in providers.items():
            prepare, backward = _backward(call, which)
            if name in forced:  # its kernels run here, long after the forward and its backend
                backward = _on(forced[name], backward)
            entries.append(
                Entry(
                    name, backward, count=count, tolerance=TOLERANCE[_dtype(config)],
                    prepare=prepare, grad=True, eager="compile" not in name,
                )
            )  # fmt: skip

        def truth(*inputs: Any) -> Any:
            prepare, backward = _backward(providers[first], which)
            with torch.enable_grad():
                return backward(*prepare(_double(inputs)))

    return Case(
        kernel, mode, "N", config, device, _sets(device, draw), entries, truth, baseline=first
    )


def match(config: Config, device: torch.device, compile_reference: bool, mode: str) -> Case:
    """The bipartite match of a metric; its error is the similarity that its choice gives away."""
    batch, n, channels, r = (int(config[k]) for k in ("B", "N", "C", "r"))
    dtype = _dtype(config)

    def draw() -> tuple[Any, ...]:
        return (torch.randn(batch, n, channels, device=device).to(dtype),)

    case = _case(
        "match", mode, config, device,
        {
            "reference": functools.partial(reference.bipartite_match, r=r),
            "fused": functools.partial(kernels.bipartite_match, r=r),
        },
        draw, counts.match(batch, n, channels, dtype.itemsize), compile_reference,
    )  # fmt: skip
    return _judged(case, r, lambda metric: metric)


def match_keys(config: Config, device: torch.device, compile_reference: bool, mode: str) -> Case:
    """The match of the keys' mean over heads, from the packed buffer of a layer."""
    batch, n, channels, r = (int(config[k]) for k in ("B", "N", "C", "r"))
    dtype = _dtype(config)

    def draw() -> tuple[Any, ...]:
        qkv = torch.randn(batch, n, 3, HEADS, channels, device=device).to(dtype)
        return (qkv[:, :, 1].transpose(1, 2),)

    def unfused(k: Tensor) -> Tensor:
        return reference.bipartite_match(reference.key_metric(k), r)

    case = _case(
        "match_keys", mode, config, device,
        {"reference": unfused, "fused": functools.partial(kernels.match_keys, r=r)},
        draw, counts.match_keys(batch, HEADS, n, channels, dtype.itemsize), compile_reference,
    )  # fmt: skip
    return _judged(case, r, reference.key_metric)


def _judged(case: Case, r: int, metric_of: Callable[[Tensor], Tensor]) -> Case:
    """A match's case, whose error is the similarity that a choice of r pairs gives away."""

    def lost(metric: Tensor, assignment: Tensor) -> float:
        """Share of the best total similarity of r pairs that this choice does not have."""
        scores = reference.match_scores(metric.double(), True, True)
        best = scores.max(-1).values.topk(r).values.sum()
        rows = assignment.long()
        # B's tokens keep a row each, so a token of A is merged where its row is one of B's.
        row_of_b = rows[:, 1::2]
        hit = rows[:, ::2, None] == row_of_b[:, None]
        hit &= torch.isfinite(scores)
        chosen = scores.masked_fill(~hit, 0).sum()
        return float(((best - chosen) / best).abs())

    def error(entry: Entry, result: Tensor, truth: Tensor, inputs: tuple[Any, ...]) -> float:
        if entry.provider.startswith("fused"):
            assert_valid_match(metric_of(inputs[0].double()), result, r, True, True)
        return lost(metric_of(inputs[0].double()), result)

    case.error = error
    for entry in case.entries:
        entry.tolerance = TOLERANCE[torch.float32]  # scores are fp32 whatever the metric is
    return case


def _tokens(config: Config, device: torch.device) -> Callable[[], tuple[Any, ...]]:
    """Tokens, an assignment and sizes of a clip's middle layer."""
    batch, n, dim, r = (int(config[k]) for k in ("B", "N", "D", "r"))

    def draw() -> tuple[Any, ...]:
        x = torch.randn(batch, n, dim, device=device).to(_dtype(config))
        assignment = reference.bipartite_match(torch.randn(batch, n, 64, device=device), r)
        return x, assignment, torch.randint(1, 4, (batch, n), device=device).float()

    return draw


def merge(config: Config, device: torch.device, compile_reference: bool, mode: str) -> Case:
    """The size-weighted merge by an assignment, or its gradient."""
    batch, n, dim, r = (int(config[k]) for k in ("B", "N", "D", "r"))

    def with_(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, assignment, size: op(x, assignment, n - r, size)

    return _case(
        "merge", mode, config, device,
        {"reference": with_(reference.merge), "fused": with_(kernels.merge)},
        _tokens(config, device), counts.merge(batch, n, dim, r, _dtype(config).itemsize),
        compile_reference, (0,),
    )  # fmt: skip


def merge_add_layer_norm(
    config: Config, device: torch.device, compile_reference: bool, mode: str
) -> Case:
    """Residual add, merge and LayerNorm; and beside it the same with nothing to merge (r=0)."""
    batch, n, dim, r = (int(config[k]) for k in ("B", "N", "D", "r"))
    dtype = _dtype(config)
    tokens = _tokens(config, device)

    def draw() -> tuple[Any, ...]:
        x, assignment, size = tokens()
        weight, bias = torch.randn(2, dim, device=device).to(dtype)
        return x, torch.randn_like(x), assignment, size, weight, bias

    def with_(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, y, assignment, size, w, b: op(x, y, assignment, n - r, size, w, b, EPS)

    count = counts.merge_add_layer_norm(batch, n, dim, r, dtype.itemsize)
    if mode == "backward":  # two gradients and the merged tokens in, one gradient out
        count = Count(3 * count.flops, batch * dim * (3 * (n - r) + n) * dtype.itemsize, 1)
    case = _case(
        "merge_add_layer_norm", mode, config, device,
        {
            "reference": with_(reference.merge_add_layer_norm),
            "fused": with_(kernels.merge_add_layer_norm),
        },
        draw, count, compile_reference, (0, 1, 4, 5),
    )  # fmt: skip
    if mode == "forward":

        def unmerged(op: Callable[..., Any]) -> Callable[..., Any]:
            return lambda x, y, assignment, size, w, b: op(x, y, w, b, EPS)

        plain = counts.add_layer_norm(batch, n, dim, dtype.itemsize)
        calls = {"fused": unmerged(kernels.add_layer_norm)}
        for backend in _forced_backends("add_layer_norm", config, device):
            calls[f"fused {backend}"] = _on(backend, calls["fused"])

        def truth(*inputs: Any) -> Any:
            return unmerged(reference.add_layer_norm)(*_double(inputs))

        entries = _entries(calls, config, device, False, count=plain, truth=truth)
        case.entries += [replace(entry, config={"r": 0}) for entry in entries]
    return case


def attention(config: Config, device: torch.device, compile_reference: bool, mode: str) -> Case:
    """Attention with a log size a key: materialised, PyTorch's fused one with a mask, ours."""
    batch, n = int(config["B"]), int(config["N"])
    dtype = _dtype(config)

    def draw() -> tuple[Any, ...]:
        # q, k and v lie in one buffer, as a model's qkv product leaves them
        qkv = torch.randn(batch, n, 3, HEADS, HEAD_DIM, device=device).to(dtype)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v, torch.randint(1, 4, (batch, n), device=device).float().log()

    def sdpa(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
        # A mask of another dtype than q is silently misread by one of CUDA's backends.
        return F.scaled_dot_product_attention(q, k, v, log_size.to(q.dtype)[:, None, None])

    count = counts.attention(batch, HEADS, n, HEAD_DIM, dtype.itemsize)
    if mode == "backward":  # five products for the forward's two; q, k, v, o, do in, dq, dk, dv out
        count = Count(2.5 * count.flops, 2 * count.bytes, 1)
    case = _case(
        "attention", mode, config, device,
        {"reference": reference.attention, "sdpa": sdpa, "fused": kernels.attention},
        draw, count, compile_reference, (0, 1, 2),
    )  # fmt: skip
    if device.type == "cuda" and mode == "forward":
        # What PyTorch runs where no token has a size, and may run on kernels that know no mask.

        def unmasked(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        def plain(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor) -> Tensor:
            return reference.attention(q.double(), k.double(), v.double())

        for suffix in ("", "+graph"):
            graph = bool(suffix)
            case.entries.append(
                Entry(
                    "sdpa_unmasked" + suffix, unmasked, {}, count, TOLERANCE[dtype], rival=False,
                    truth=plain, eager=not graph, graph=graph,
                )
            )  # fmt: skip
    # Bound by arithmetic: whether operands come from memory or a cache is lost in it.
    case.inputs = case.inputs[:2]
    return case


def tome_step(config: Config, device: torch.device, compile_reference: bool, mode: str) -> Case:
    """Match and merge: the published, unfused step in the tokens' dtype, and the fused one.

    In half precision the published step scores in half precision too, where many scores tie: it
    merges other tokens than fp64 would. It is held to the total of the tokens, which any choice
    keeps; how far its choice takes it from the truth is reported as its error.
    """
    batch, n, dim, channels, r = (int(config[k]) for k in ("B", "N", "D", "C", "r"))
    dtype = _dtype(config)

    def draw() -> tuple[Any, ...]:
        x = torch.randn(batch, n, dim, device=device).to(dtype)
        metric = torch.randn(batch, n, channels, device=device).to(dtype)
        return x, metric, torch.randint(1, 4, (batch, n), device=device).float()

    def published(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        return reference.published_step(x, metric, r, size.to(x.dtype))

    def fused(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        assignment = kernels.bipartite_match(metric, r)
        return kernels.merge(x, assignment, n - r, size)

    count = counts.match(batch, n, channels, dtype.itemsize)
    count += counts.merge(batch, n, dim, r, dtype.itemsize)
    case = _case(
        "tome_step", mode, config, device,
        {"published": published, "fused": fused}, draw, count, compile_reference,
    )  # fmt: skip
    half = dtype != torch.float32

    def total(x: Tensor, size: Tensor) -> Tensor:
        return (x.double() * size.double()[..., None]).sum(1)

    def error(entry: Entry, result: Any, truth: Any, inputs: tuple[Any, ...]) -> float:
        if half and entry.provider.startswith("published"):
            kept = relative_error(total(*result), total(inputs[0], inputs[2]))
            if not kept < 10 * TOLERANCE[dtype]:
                return float("nan")
        return relative_error(result, truth)

    case.error = error
    for entry in case.entries:
        if half and entry.provider.startswith("published"):
            entry.tolerance = None
    return case


def hugging_face_extractor(
    frames: int, normalise: bool = False
) -> Callable[[Tensor], Tensor] | None:
    """Hugging Face's feature extractor as it is without torchaudio, in NumPy; None without it."""
    try:
        from transformers import ASTFeatureExtractor
        from transformers.models.audio_spectrogram_transformer import (
            feature_extraction_audio_spectrogram_transformer as module,
        )
    except ImportError:
        return None
    without_torchaudio = mock.patch.object(module, "is_speech_available", lambda: False)
    with without_torchaudio:
        extractor = ASTFeatureExtractor(max_length=frames, do_normalize=normalise)

    def features(waves: Tensor) -> Tensor:
        arrays = [wave.numpy() for wave in waves.cpu()]
        with without_torchaudio:
            return extractor(arrays, sampling_rate=16000, return_tensors="pt")["input_values"]

    return features


def fbank(config: Config, device: torch.device, compile_reference: bool, mode: str) -> Case:
    """Waveforms to log-mel features: as Hugging Face computes them, as AST does, and ours."""
    from fastast.features import Fbank

    clips, seconds = int(config["B"]), int(config["seconds"])
    samples, frames = 16000 * seconds, FRAMES[seconds]
    ours = Fbank(target_length=frames, mean=None, std=None).to(device)

    def draw() -> tuple[Any, ...]:
        tone = 0.3 * torch.randn(clips, samples).cumsum(-1).sin()
        return ((tone + 0.01 * torch.randn(clips, samples)).to(device),)

    providers: dict[str, Callable[..., Any]] = {}
    try:
        from torchaudio.compliance import kaldi
    except Exception:  # it fails in several ways where its build does not fit torch's
        pass
    else:

        def torchaudio_loop(waves: Tensor) -> Tensor:
            out = []
            for wave in waves:
                mel = kaldi.fbank(
                    (wave - wave.mean())[None], htk_compat=True, sample_frequency=16000,
                    use_energy=False, window_type="hanning", num_mel_bins=128, dither=0.0,
                    frame_shift=10,
                )  # fmt: skip
                out.append(F.pad(mel, (0, 0, 0, frames - len(mel)))[:frames])
            return torch.stack(out)

        providers["torchaudio"] = torchaudio_loop
    providers["fused"] = ours
    extractor = hugging_face_extractor(frames)
    if extractor is not None:
        providers["hf_extractor"] = extractor
    count = counts.fbank(clips, samples, frames)
    # By norm: in fp32 a loud tone leaves rounding noise in the quiet bands of all of them, up to
    # 1e-3 of a log unit. (To torchaudio's fp32 ours is 1e-6, which tests/test_features.py holds.)
    shared: dict[str, Any] = {"count": count, "tolerance": TOLERANCE[torch.float32]}
    entries = [Entry(name, call, **shared) for name, call in providers.items()]
    for entry in entries:
        entry.eager = entry.provider != "hf_extractor"
    baseline = entries[0].provider

    def truth(waves: Tensor) -> Tensor:
        return ours(waves.double())

    return Case(
        "fbank", mode, "B", config, device, _sets(device, draw)[:2], entries, truth,
        baseline=baseline, seconds=4.0,
    )  # fmt: skip


CASES: dict[str, Callable[[Config, torch.device, bool, str], Case]] = {
    "match": match,
    "match_keys": match_keys,
    "merge": merge,
    "merge_add_layer_norm": merge_add_layer_norm,
    "attention": attention,
    "tome_step": tome_step,
    "fbank": fbank,
}
