"""Build of the compiled extension ``fastast_kernels._C``; everything else is in pyproject.toml.

Environment:

======================  ==========================================================================
FASTAST_BUILD           ``auto`` (default): C++ and CUDA where both can be built, else less.
                        ``cpu``: C++ only. ``cuda``: both, or fail. ``none``: pure Python.
TORCH_CUDA_ARCH_LIST    CUDA architectures, default ``8.0+PTX;9.0a``.
CUDA_HOME               CUDA toolkit folder; found from nvcc unless set.
MAX_JOBS                compiler processes at a time.
DEBUG                   ``1``: no optimisation, debug symbols.
CXX                     C++ compiler.
======================  ==========================================================================

The ops use the libtorch stable ABI, so a wheel built here works with this torch and newer ones.
What cannot be built is left out with a printed reason, and plain PyTorch takes its place.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest version that runs what is built here
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"


def say(message: str) -> None:
    print(f"fastast: {message}", flush=True)


def cuda_toolkit() -> tuple[str, str] | None:
    """The toolkit folder and its version, also where nvcc is a wrapper outside of it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    # A dry run names the real toolkit (TOP=...), whatever script stands in front of it.
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", version)
    if top is None or release is None:
        return None
    return str(Path(top.group(1).strip()).resolve()), release.group(1)


def wanted() -> tuple[str, str | None]:
    """What to build (``none``, ``cpu`` or ``cuda``) and with which CUDA toolkit."""
    choice = os.environ.get("FASTAST_BUILD", "auto").lower()
    if choice not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"fastast: FASTAST_BUILD must be auto, cpu, cuda or none, got {choice!r}")
    if choice == "none":
        say("FASTAST_BUILD=none: pure Python, nothing is compiled")
        return "none", None

    def missing(reason: str, smaller: str) -> tuple[str, None]:
        if choice == "cuda" or (choice == "cpu" and smaller == "none"):
            raise SystemExit(f"fastast: FASTAST_BUILD={choice}, but {reason}")
        say(f"{reason}; building {'C++ only' if smaller == 'cpu' else 'nothing, pure Python'}")
        return smaller, None

    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        return missing(f"{error.name} is not importable (try --no-build-isolation)", "none")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return missing(f"no C++ compiler ({compiler} not found; set CXX)", "none")
    if choice == "cpu":
        return "cpu", None
    if torch.version.cuda is None:
        return missing("this torch is a CPU build", "cpu")
    toolkit = cuda_toolkit()
    if toolkit is None:
        return missing("no CUDA toolkit (nvcc not found; set CUDA_HOME)", "cpu")
    home, version = toolkit
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return missing(f"nvcc is CUDA {version} and torch is CUDA {torch.version.cuda}", "cpu")
    return "cuda", home


def extension() -> dict:
    """Keyword arguments of ``setup`` for the extension that this machine can build."""
    kind, cuda_home = wanted()
    if kind == "none":
        return {}
    if cuda_home is not None:
        os.environ["CUDA_HOME"] = cuda_home  # torch reads it when cpp_extension is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)

    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    macros = [
        ("TORCH_TARGET_VERSION", STABLE_ABI),
        ("FASTAST_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
        ("FASTAST_BUILT_WITH_CUDA", f'"{torch.version.cuda if kind == "cuda" else ""}"'),
    ]
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";") if kind == "cuda" else ""
    macros.append(("FASTAST_CUDA_ARCHITECTURES", f'"{architectures}"'))
    # The AVX2 and AVX-512 variants are chosen by GCC's target pragma, one file each.
    if platform.machine() in ("x86_64", "AMD64"):
        macros.append(("FASTAST_X86_VARIANTS", "1"))
    debug = os.environ.get("DEBUG", "0") == "1"
    flags = ["-O0", "-g"] if debug else ["-O3", "-fno-math-errno", "-fno-trapping-math"]
    compile_args = {"cxx": [*flags, "-std=c++17", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]}
    make = CppExtension
    if kind == "cuda":
        make = CUDAExtension
        sources += [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]
        macros.append(("USE_CUDA", "1"))
        compile_args["nvcc"] = ["-O3", "-std=c++17", "-Xptxas=-v"]
    say(f"building C++ and CUDA ({architectures}, {cuda_home})" if cuda_home else "building C++")
    return {
        "ext_modules": [
            make(
                "fastast_kernels._C",
                sorted(str(s.relative_to(ROOT)) for s in sources),
                include_dirs=[pybind11.get_include()],
                define_macros=macros,
                extra_compile_args=compile_args,
                extra_link_args=[] if debug else ["-s"],
            )
        ],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
    }


setup(**extension())
