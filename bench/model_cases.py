"""Whole models beside what a user would pick: on every engine, in training, from the waveform.

All start from one Hugging Face model with random weights, and are held against one truth in fp64.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import engines
import torch
from published import replace_layers
from torch import Tensor
from transformers import ASTConfig as HFConfig
from transformers import ASTForAudioClassification

import fastast
from fastast.benchmark.case import Case, Config, Entry, relative_error
from fastast.benchmark.graphs import forget_compiled
from fastast.benchmark.kernels import FRAMES, hugging_face_extractor
from fastast.benchmark.models import LOGITS, Truth, features, fused, logits_error
from fastast.features import Fbank
from fastast.linear import why_no_int8
from fastast.model import AST
from fastast.schedules import macs
from fastast_kernels import use_backend

if TYPE_CHECKING:
    from specs import ModelSpec

# What a set runs of the engines. Compiling in fp32 takes a minute each, gains nothing on ten-second
# clips and an eighth on one-second ones, where OpenVINO is faster still: only ``all`` does it. In
# bf16 it gains 2 % and 11 %, and ``most`` has it.
FEW = (("hf_sdpa", "float32"), ("hf_sdpa", "bfloat16"), ("openvino", "bfloat16"))
SOME = (*FEW, ("openvino", "float32"), ("openvino", "int8"))


def chosen(level: str, device: torch.device) -> tuple[tuple[str, str], ...]:
    """Engines of a level: ``all``, ``most`` (without what takes minutes), ``some``, ``few``."""
    every = engines.CUDA_ENGINES if device.type == "cuda" else engines.CPU_ENGINES
    if device.type == "cuda":  # fp32 is Hugging Face's default there too, and no more than that
        every = tuple(e for e in every if e[1] == "bfloat16" or e == FEW[0])
    slow = [("hf_compile", "float32"), ("hf_compile_max", "bfloat16")]
    most = tuple(e for e in every if e not in slow)
    return {"all": every, "most": most, "some": SOME, "few": FEW}[level]


# int8 rounds activations to 8 bits: its error is reported and only a broken engine is refused.
INT8_LIMIT = 0.5
# Published merging in bf16 scores in bf16, where scores tie, and so merges other tokens.
PUBLISHED_BF16_LIMIT = 0.25
# On a GPU PyTorch's convolution rounds fp32 to TF32 unless told otherwise, and Hugging Face's patch
# embedding is one. It is what its users get.
TF32_LIMIT = 2e-3
# Gradients of the features, through all blocks.
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


def hugging_face(seconds: int, size: str = "base") -> ASTForAudioClassification:
    """An AST as Hugging Face builds it, random weights."""
    torch.manual_seed(0)
    wanted = getattr(fastast.ASTConfig, size)(target_length=FRAMES[seconds])
    config = HFConfig(
        max_length=wanted.target_length,
        num_labels=527,
        hidden_size=wanted.embed_dim,
        num_hidden_layers=wanted.depth,
        num_attention_heads=wanted.num_heads,
        intermediate_size=wanted.mlp_dim,
    )
    return ASTForAudioClassification(config).eval()


def same_weights(model: ASTForAudioClassification) -> AST:
    """Our AST with a Hugging Face model's weights, by way of its files."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AST.from_pretrained(folder)


def _compiled(forward: Callable[[Tensor], Tensor], example: Tensor, threads: int) -> Any:
    """``forward`` compiled for one shape, as the engines' compiled models are; a graph on a GPU."""
    if example.device.type == "cpu":
        run = torch.compile(forward, dynamic=False)
        options = {"cpp.threads": threads, "freezing": True}
        with torch._inductor.config.patch(options), torch.inference_mode():
            run(example)
        return run
    graph = torch.compile(forward, dynamic=False, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(3):  # the second call records the graph
            graph(example)
    return lambda x: graph(x).clone()  # the next call writes into the same memory


def _graph(model: AST, dtype: torch.dtype, r: int, example: Tensor) -> Callable[[Tensor], Tensor]:
    """A patched copy of a model as ``fastast.optimize`` makes it, captured already."""
    run = fastast.optimize(fastast.patch(copy.deepcopy(model), r=r), dtype)
    for _ in range(2):  # the second call records the graph
        run(example)
    return lambda x: run(x).float()


def engine_case(spec: ModelSpec, device: torch.device, foreign: bool = True) -> Case:
    """All engines at r=0, the published patch at r, ours at both; in fp32, bf16 and int8.

    Args:
        spec: clip length, batch, threads and r.
        device: where.
        foreign: also what is compiled or not PyTorch's; without it, only what memory is counted of.
    """
    forget_compiled()
    model = hugging_face(spec.seconds).to(device)
    ours = same_weights(model).to(device)
    truth = Truth(ours)
    x = features(ours.config, spec.batch).to(device)
    entries: list[Entry] = []
    left_out: list[str] = []
    merged = functools.partial(truth, r=spec.r)

    def add(
        provider: str, dtype: str, call: Callable[[Tensor], Tensor], r: int = 0, eager: bool = True,
        tolerance: float | None = None, **more: Any,
    ) -> None:  # fmt: skip
        config = {"dtype": dtype, "r": r}
        limit = tolerance or LOGITS[getattr(torch, dtype)]
        if device.type == "cuda" and not provider.startswith("fused"):
            limit = max(limit, TF32_LIMIT)
        more.setdefault("truth", merged if r else None)
        entries.append(
            Entry(provider, call, config, None, limit, eager=eager, **more)  # type: ignore[arg-type]
        )

    thorough = spec.engines in ("all", "most")
    coarse = engines.build_stride16(model, "float32") if thorough and foreign else None
    for name, dtype in chosen(spec.engines, device):
        compiled_or_foreign = not name.startswith("hf_") or "compile" in name
        if compiled_or_foreign and not foreign:
            continue
        call, reason = _built(engines.build, name, dtype, model, x, spec.threads)
        if call is None:
            left_out.append(f"{spec}: {name} {dtype}: {reason}")
            continue
        limit = INT8_LIMIT if dtype == "int8" else None
        add(name, dtype, call, eager=not compiled_or_foreign, tolerance=limit)
        if coarse is not None and name in ("hf_sdpa", "openvino") and dtype != "int8":
            # The honest alternative: no overlap, fewer tokens. In fp64 it is its own truth.
            call = engines.build(name, dtype, coarse, x, spec.threads)
            add(
                f"stride16 {name}", dtype, call, eager=False, rival=False,
                truth=functools.partial(_double_logits, coarse),
                tolerance=2 * LOGITS[getattr(torch, dtype)],
            )  # fmt: skip

    for dtype in ("float32", "bfloat16"):
        kind = getattr(torch, dtype)
        loose = PUBLISHED_BF16_LIMIT if dtype == "bfloat16" else None
        schedule = [spec.r] * ours.config.depth
        compile_too = dtype == "bfloat16" or spec.engines == "all"
        if spec.engines != "few":
            for attention, compiled in (
                ("materialised", False), ("sdpa", False), ("sdpa", True),
            ):  # fmt: skip
                if compiled and not (foreign and thorough and compile_too):
                    continue
                name = f"published {attention}" + ("+compile" if compiled else "")
                call, reason = _built(
                    engines.build_published,
                    model, schedule, attention, dtype, x, compiled, spec.threads,
                )  # fmt: skip
                if call is None:
                    left_out.append(f"{spec}: {name} {dtype}: {reason}")
                    continue
                add(name, dtype, call, spec.r, not compiled, loose)
        for r in (0, spec.r):
            add("fused", dtype, fused(ours, kind, r), r, macs=macs(ours.config, r))
            if foreign and device.type == "cuda":
                add("fused+graph", dtype, _graph(ours, kind, r, x), r, False)
        if foreign and thorough and compile_too:
            patched = fastast.patch(copy.deepcopy(ours).to(kind), r=spec.r)

            def forward(x: Tensor, patched: AST = patched) -> Tensor:
                return patched(x).float()

            add("fused+compile", dtype, _compiled(forward, x, spec.threads), spec.r, False)

    if device.type == "cpu" and why_no_int8() is None:
        for r in (0, spec.r):
            call = fused(ours, "int8", r)
            add("fused", "int8", call, r, tolerance=INT8_LIMIT, macs=macs(ours.config, r))
    case = _model_case("forward", spec, device, x, entries, truth, logits_error)
    case.left_out = left_out
    return case


def _built(build: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What ``build`` makes, or None and why not: one engine that fails does not stop the others."""
    try:
        return build(*arguments), ""
    except Exception as error:  # missing packages, compilers that give up, no memory
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _double_logits(model: torch.nn.Module, x: Tensor) -> Tensor:
    double = copy.deepcopy(model).double()
    with torch.inference_mode():
        return double(x.double()).logits


def training_case(spec: ModelSpec, device: torch.device, foreign: bool = True) -> Case:
    """Forward and backward of a training step: Hugging Face, the published patch, ours.

    Gradients of all weights are computed; those of the features, through every layer, and the loss
    are held against fp64. bf16 is autocast over fp32 weights, as people train.
    """
    model = hugging_face(spec.seconds, spec.model).to(device)
    ours = same_weights(model).to(device)
    dtype = getattr(torch, spec.dtype)
    x = features(ours.config, spec.batch).to(device)
    target = torch.arange(spec.batch, device=device) % ours.config.num_classes
    known: dict[int, Any] = {}

    def step(
        run: Callable[[Tensor], Tensor], weights: list[Tensor], x: Tensor, half: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype, enabled=half):
            logits = run(x)
        loss = torch.nn.functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), target
        )
        return loss.detach(), torch.autograd.grad(loss, [x, *weights])[0]

    def truth(x: Tensor, r: int) -> Any:
        if r not in known:
            double = copy.deepcopy(ours).double()
            with torch.enable_grad(), use_backend("reference"), fastast.patched(double, r=r):
                leaf = x.detach().double().requires_grad_()
                known[r] = step(double, list(double.parameters()), leaf, False)
        return known[r]

    entries: list[Entry] = []

    def add(
        provider: str, module: torch.nn.Module, run: Callable[[Tensor], Tensor], r: int, **more: Any
    ) -> None:
        weights = [p.requires_grad_() for p in module.parameters()]
        half = dtype != torch.float32
        entries.append(
            Entry(
                provider,
                lambda x: step(run, weights, x, half),
                {"r": r},
                tolerance=GRADIENTS[dtype],
                prepare=lambda inputs: (inputs[0].detach().requires_grad_(),),
                truth=functools.partial(truth, r=r),
                grad=True,
                **more,
            )
        )

    hf = copy.deepcopy(model)
    add("hf_sdpa", hf, lambda x: hf(x).logits, 0)
    schedule = [spec.r] * ours.config.depth
    published = replace_layers(copy.deepcopy(model), schedule, "sdpa")
    add("published sdpa", published, lambda x: published(x).logits, spec.r, rival=False)
    if dtype != torch.float32:  # it merges other tokens in bf16: see PUBLISHED_BF16_LIMIT
        entries[-1].tolerance = None
    for r in (0, spec.r):
        module = fastast.patch(copy.deepcopy(ours), r=r)
        add("fused", module, module, r, macs=macs(ours.config, r))
    return _model_case("training", spec, device, x, entries, lambda x: truth(x, 0), relative)


def waveform_case(spec: ModelSpec, device: torch.device, foreign: bool = True) -> Case:
    """Samples to logits: Hugging Face's extractor and model, and our front end and model."""
    model = hugging_face(spec.seconds).to(device)
    ours = same_weights(model).to(device)
    torch.manual_seed(0)
    samples = 16000 * spec.seconds
    tone = 0.3 * torch.randn(spec.batch, samples).cumsum(-1).sin()
    waves = tone + 0.01 * torch.randn(spec.batch, samples)
    waves[-1] = waves[0]
    frames = FRAMES[spec.seconds]
    config = ours.config
    fbank = Fbank(target_length=frames, mean=config.mean, std=config.std).to(device)
    logits = Truth(ours)
    extractor = hugging_face_extractor(frames, normalise=True)
    assert extractor is not None, "transformers is installed: hugging_face() has just used it"
    entries: list[Entry] = []
    for dtype in ("float32", "bfloat16"):
        kind = getattr(torch, dtype)
        limit = {"float32": TF32_LIMIT, "bfloat16": LOGITS[torch.bfloat16]}[dtype]
        run = engines.build("hf_sdpa", dtype, model, fbank(waves.to(device)), spec.threads)

        def hf(waves: Tensor, run: Callable[[Tensor], Tensor] = run) -> Tensor:
            return run(extractor(waves).to(device))

        truth = functools.partial(_from_waves, fbank, logits, r=0)
        entries.append(
            Entry("hf_sdpa", hf, {"dtype": dtype, "r": 0}, None, limit, truth=truth, eager=False)
        )
        for r in (0, spec.r):
            forward = fused(ours, kind, r)

            def run_ours(waves: Tensor, forward: Callable[[Tensor], Tensor] = forward) -> Tensor:
                return forward(fbank(waves.to(device)))

            truth = functools.partial(_from_waves, fbank, logits, r=r)
            entries.append(
                Entry("fused", run_ours, {"dtype": dtype, "r": r}, None, limit, truth=truth)
            )
    return _model_case("waveform", spec, device, waves, entries, lambda w: None, logits_error)


def _from_waves(fbank: Fbank, truth: Truth, waves: Tensor, r: int) -> Tensor:
    return truth(fbank(waves.double().to(fbank.mel.device)), r)


def _model_case(
    mode: str, spec: ModelSpec, device: torch.device, x: Tensor, entries: list[Entry],
    truth: Callable[..., Any], error: Callable[..., float],
) -> Case:  # fmt: skip
    config: Config = {
        "model": spec.model,
        "seconds": spec.seconds,
        "B": spec.batch,
        "threads": spec.threads,
        "beside": spec.kind,
    }
    if mode == "training":
        config["dtype"] = spec.dtype
    return Case(
        "ast", mode, "r", config, device, [(x,)], entries, truth, baseline="hf_sdpa",
        error=error, seconds=spec.budget,
    )  # fmt: skip


def relative(entry: Entry, result: Any, truth: Any, inputs: object) -> float:
    """Relative error of a loss and a gradient."""
    return relative_error(result, truth)
