"""The software behind a result, and the environment variables that affect it."""

import contextlib
import importlib.metadata
import os
import subprocess
from pathlib import Path

LIBRARIES = tuple(
    """
    numpy torch torchvision timm opencv-python-headless simplejpeg faiss-cpu pydegensac
    poselib
    """.split()
)
# Variables that libraries read once, when they are loaded, and that change results, if only in the
# last bits: instruction sets, reduced precision, other algorithms, limits.
NUMERIC = tuple(
    """
    ATEN_CPU_CAPABILITY CUBLAS_WORKSPACE_CONFIG DNNL_DEFAULT_FPMATH_MODE DNNL_MAX_CPU_ISA
    FAISS_DISABLE_CPU_FEATURES FAISS_OPT_LEVEL GLIBC_TUNABLES JSIMD_FORCENONE MKL_CBWR
    MKL_DISABLE_FAST_MM MKL_ENABLE_INSTRUCTIONS NCCL_ALGO NCCL_PROTO NPY_DISABLE_CPU_FEATURES
    NPY_ENABLE_CPU_FEATURES NVIDIA_TF32_OVERRIDE ONEDNN_DEFAULT_FPMATH_MODE ONEDNN_MAX_CPU_ISA
    OPENBLAS_CORETYPE OPENCV_CPU_DISABLE OPENCV_IO_MAX_IMAGE_HEIGHT OPENCV_IO_MAX_IMAGE_PIXELS
    OPENCV_IO_MAX_IMAGE_WIDTH OPENCV_IPP PYTORCH_TUNABLEOP_ENABLED TIMM_FUSED_ATTN
    TIMM_USE_NAFLEX TIMM_USE_NAFLEXVIT TIMM_USE_SCIPY_INTERP TORCHDYNAMO_DISABLE
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT TORCH_COMPILE_DISABLE
    TORCH_CUDNN_USE_HEURISTIC_MODE_B TORCH_CUDNN_V8_API_DISABLED TORCH_LINALG_PREFER_CUSOLVER
    TORCH_MKLDNN_MATMUL_MIN_DIM TORCH_MKLDNN_MATMUL_MIN_SIZE VITGAL_MAX_MEGAPIXELS
    """.split()
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def numeric_environment() -> dict[str, dict[str, str]]:
    """Returns the parameter `environment`, the set variables of NUMERIC; empty without any."""
    variables = {name: os.environ[name] for name in NUMERIC if os.environ.get(name)}
    return {"environment": variables} if variables else {}


def versions() -> dict[str, str]:
    """Returns the installed versions of the libraries that results depend on, by name."""
    installed = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def commit() -> str | None:
    """Returns the checkout's commit, with `+` where tracked files are changed; None without git.

    Ignores git's environment variables and a repository that encloses the package.
    """
    top = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(top), f"--git-dir={top / '.git'}", f"--work-tree={top}"]
    git += ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        described = subprocess.run(git, capture_output=True, text=True, env=clean)
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() if described.returncode == 0 else None
