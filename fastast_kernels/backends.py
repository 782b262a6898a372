"""Which implementation of an op runs, why, and how to force one.

Backends are ``reference`` (plain PyTorch, anywhere), ``cpp`` (compiled CPU kernels), ``triton``
and ``cuda`` (GPU kernels). Left alone, every op takes the fastest that its device has and falls
back to the reference; :func:`backends` says what that is and why the others are out. Where both GPU
backends have an op, ``triton`` is the default but for what was measured (:mod:`winners`). A backend
asked for by name (:func:`use_backend`, or the environment variable ``FASTAST_BACKEND``) runs or
raises.

With ``TRITON_INTERPRET=1`` and ``FASTAST_BACKEND=triton`` in the environment the Triton kernels run
in Triton's interpreter on CPU tensors, behind the same ops: slow, for tests and debugging.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
BACKENDS = ("reference", "cpp", "triton", "cuda")
GPU_BACKENDS = ("triton", "cuda")

OPS = (
    "bipartite_match",
    "key_metric",
    "match_keys",
    "merge",
    "unmerge",
    "add_layer_norm",
    "merge_add_layer_norm",
    "attention",
    "attention_column_sums",
)

# Ops with a kernel in CUDA C++, the default where winners.json says so or Triton is missing.
CUDA_ROW_OPS = frozenset({"merge", "unmerge", "add_layer_norm", "merge_add_layer_norm"})
CUDA_OPS = frozenset({"key_metric", "bipartite_match", "match_keys", *CUDA_ROW_OPS})
CUDA_MAX_WIDTH = 4096

# Ops that Triton multiplies matrices for, which it does not do in fp64.
_TRITON_PRODUCTS = frozenset(
    {"bipartite_match", "match_keys", "attention", "attention_column_sums"}
)
_TRITON_HEADS = frozenset({"attention", "attention_column_sums"})
TRITON_MAX_HEAD_DIM = 128
TRITON_MIN_CAPABILITY = (8, 0)

# Ops whose "cpp" kernels are torch's own C++ (attention_op.py) where ours is not built, or does
# not exist.
_TORCH_CPP_OPS = frozenset({"attention", "attention_column_sums"})


INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("FASTAST_BACKEND") == "triton"
)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


def _load_extension() -> str | None:
    """Load the compiled ops; None, or why they are not there."""
    isa = os.environ.get("FASTAST_CPU_ISA")
    if isa and isa not in INSTRUCTION_SETS:
        names = ", ".join(INSTRUCTION_SETS)
        raise ValueError(f"FASTAST_CPU_ISA must be one of {names}, got {isa!r}")
    if INTERPRETED:
        return "Triton's interpreter has taken over the CPU (TRITON_INTERPRET=1)"
    try:
        importlib.import_module("fastast_kernels._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fastast_kernels._C":
            return "the compiled extension was not built (reinstall with a C++ compiler)"
        return f"the compiled extension does not load: {error}"
    return None


_extension_error = _load_extension()
COMPILED = _extension_error is None


def _built_for_cuda() -> list[str]:
    if _extension_error is not None:
        return []
    from . import _C

    return _C.cuda_architectures()


_cuda_architectures = _built_for_cuda()

_triton_error = (
    None if importlib.util.find_spec("triton") is not None else "triton is not installed"
)
_capability: tuple[int, int] | None = None  # of the current device, once a GPU was asked for


def _too_old() -> bool:
    """Whether the GPU is too old for Triton's kernels; looked up once, and not at import."""
    global _capability
    if _capability is None:
        if not torch.cuda.is_available():
            return False
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        _capability = properties.major, properties.minor
    return _capability < TRITON_MIN_CAPABILITY


def built_for(capability: tuple[int, int]) -> bool:
    """Whether the compiled extension has CUDA code that such a GPU runs.

    Machine code runs on later parts of the same major version, PTX on all later ones, and what is
    built for an architecture's own instructions (``9.0a``) on that alone.
    """
    for name in _cuda_architectures:
        number, _, ptx = name.partition("+")
        major, minor = map(int, number.rstrip("af").split("."))
        if number[-1] in "af":
            fits = capability == (major, minor)
        else:
            fits = (major, minor) <= capability and (bool(ptx) or major == capability[0])
        if fits:
            return True
    return False


def why_not(
    op: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    dim: int | None = None,
) -> str | None:
    """None where ``backend`` implements ``op`` for such tensors, else the reason.

    Args:
        op: one of ``OPS``.
        backend: one of ``BACKENDS``.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: of the tensors; None: whether it is there for any.
        dim: length of their last dimension, the head's in an attention; None likewise.

    Raises:
        ValueError: no such op or backend.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"cpp kernels run on the CPU, the tensors are on {device_type}"
        return None if op in _TORCH_CPP_OPS and not INTERPRETED else _extension_error
    if device_type != "cuda" and not (backend == "triton" and INTERPRETED):
        return f"{backend} kernels run on a CUDA device, the tensors are on {device_type}"
    if backend == "triton":
        return _why_not_triton(op, device_type, dtype, dim)
    if op not in CUDA_OPS:
        return f"this version has no cuda kernel of {op}"
    if _extension_error is not None or not _cuda_architectures:
        return _extension_error or "a build without CUDA"
    if dtype == torch.float64:
        return f"the cuda kernel of {op} has no float64"
    if op in ("key_metric", "match_keys") and dim is not None:
        widest = 128 if dtype == torch.float32 else 256
        if dim % 8 or not 8 <= dim <= widest:
            return f"the cuda kernel of {op} has heads of a multiple of 8 up to {widest}, not {dim}"
    if op in CUDA_ROW_OPS and dim is not None and (dim % 8 or not 8 <= dim <= CUDA_MAX_WIDTH):
        widths = f"rows of a multiple of 8 up to {CUDA_MAX_WIDTH}"
        return f"the cuda kernel of {op} has {widths}, not {dim}"
    return None


def _why_not_triton(
    op: str, device_type: str, dtype: torch.dtype | None, dim: int | None
) -> str | None:
    if _triton_error is not None:
        return _triton_error
    if device_type == "cuda" and _too_old():
        wanted = ".".join(map(str, TRITON_MIN_CAPABILITY))
        return f"triton kernels need a GPU of compute capability {wanted} or newer"
    if op in _TRITON_PRODUCTS and dtype == torch.float64:
        return f"triton's kernel of {op} has no float64"
    if op in _TRITON_HEADS and dim is not None and dim > TRITON_MAX_HEAD_DIM:
        return f"triton's kernel of {op} has heads of at most {TRITON_MAX_HEAD_DIM}, not {dim}"
    return None


def _from_environment() -> str | None:
    name = os.environ.get("FASTAST_BACKEND")
    if name and name not in BACKENDS:
        raise ValueError(f"FASTAST_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


_forced: str | None = _from_environment()


def forced() -> str | None:
    """The backend asked for by name, or None."""
    return _forced


def select(
    op: str, device_type: str, dtype: torch.dtype | None = None, dim: int | None = None
) -> str:
    """The backend that runs ``op`` on ``device_type``, for a dtype and a last dimension if given.

    Raises:
        BackendError: a backend was asked for by name and cannot run this.
    """
    if _forced is None or (INTERPRETED and _forced == "triton"):
        chosen = default(op, device_type)
        if chosen in GPU_BACKENDS and why_not(op, chosen, device_type, dtype, dim) is not None:
            return "reference"
        return chosen
    reason = why_not(op, _forced, device_type, dtype, dim)
    if reason is not None:
        raise BackendError(f"backend {_forced!r} cannot run {op}: {reason}")
    return _forced


def _fastest(op: str, device_type: str) -> str:
    if device_type == "cuda" or INTERPRETED:
        if _triton_error is None:
            return "triton"
        return "reference" if why_not(op, "cuda", device_type) else "cuda"
    return "reference" if why_not(op, "cpp", device_type) else "cpp"


# Looked up on every call, also by torch.compile while it traces, hence a table.
_DEFAULT = {
    (op, device_type): _fastest(op, device_type) for op in OPS for device_type in ("cpu", "cuda")
}


def default(op: str, device_type: str) -> str:
    """The fastest backend that has ``op`` on ``device_type``, for most tensors."""
    chosen = _DEFAULT.get((op, device_type), "reference")
    if device_type != "cuda" or chosen == "reference":
        return chosen
    if _too_old():
        return "reference"
    if chosen == "cuda" and _capability is not None and not built_for(_capability):
        return "reference"
    return chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend, or raise where it cannot.

    The choice is the process's, not the thread's: it is meant for tests, benchmarks and debugging.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: no such backend.
        BackendError: nothing of that backend can run on this machine.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cpp" and _extension_error is not None:
        raise BackendError(f"backend 'cpp' cannot run: {_extension_error}")
    if name == "cuda" or (name == "triton" and not INTERPRETED):
        if not torch.cuda.is_available():
            raise BackendError(f"backend {name!r} cannot run: torch finds no CUDA device")
        if all(why_not(op, name, "cuda") for op in OPS):
            raise BackendError(f"backend {name!r} cannot run: this version has no {name} kernels")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@dataclass(frozen=True)
class Report:
    """What :func:`backends` found; ``print`` it, or read the fields.

    Attributes:
        devices: device types that torch can use here.
        default: ``{device: {op: backend}}``, what runs unless told otherwise.
        unavailable: ``{device: {backend: {op: reason}}}``.
        forced: the backend asked for by name, or None.
        build: versions, instruction sets and CUDA architectures of the compiled extension.
        measured: ``{op: who wins how often}`` on this GPU, of ops whose two kernels were measured.
    """

    devices: tuple[str, ...]
    default: dict[str, dict[str, str]]
    unavailable: dict[str, dict[str, dict[str, str]]]
    forced: str | None
    build: dict[str, object] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        if self.forced:
            lines.append(f"forced backend: {self.forced}")
        for device in self.devices:
            lines.append(f"{device}:")
            for op, backend in self.default[device].items():
                said = self.measured.get(op, backend) if device == "cuda" else backend
                lines.append(f"  {op:<22} {said}")
            for backend, reasons in self.unavailable[device].items():
                for reason in dict.fromkeys(reasons.values()):
                    ops = [op for op, why in reasons.items() if why == reason]
                    what = "" if len(ops) == len(OPS) else f" ({', '.join(ops)})"
                    lines.append(f"  not {backend}{what}: {reason}")
        lines += [f"{key}: {value}" for key, value in self.build.items()]
        return "\n".join(lines)


def build_information() -> dict[str, object]:
    """Versions, instruction sets and CUDA architectures of the compiled extension."""
    if _extension_error is not None:
        return {"extension": _extension_error}
    from . import _C

    return {
        "extension": "loaded",
        "cpu_isa": _C.cpu_isa(),
        "supported_cpu_isa": _C.supported_cpu_isa(),
        "built_cpu_isas": _C.built_cpu_isas(),
        "cuda_architectures": _C.cuda_architectures(),
        **_C.build_info(),
    }


def backends() -> Report:
    """What can run here, what runs by default, and why not the others."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    unavailable: dict[str, dict[str, dict[str, str]]] = {}
    for device in devices:
        unavailable[device] = {}
        for backend in BACKENDS:
            reasons = {op: why for op in OPS if (why := why_not(op, backend, device))}
            if reasons:
                unavailable[device][backend] = reasons
    return Report(
        devices=devices,
        default={device: {op: default(op, device) for op in OPS} for device in devices},
        unavailable=unavailable,
        forced=_forced,
        build=build_information(),
        measured=_measured() if "cuda" in devices else {},
    )


def _measured() -> dict[str, str]:
    """Who wins how often on the current GPU, of the ops that both backends run on it."""
    from . import winners  # it needs the names above

    major, minor = torch.cuda.get_device_capability()
    if not built_for((major, minor)):
        return {}
    both = [op for op in OPS if not any(why_not(op, b, "cuda") for b in GPU_BACKENDS)]
    found = {op: winners.summary(op, f"{major}.{minor}") for op in both}
    return {op: text for op, text in found.items() if text is not None}
