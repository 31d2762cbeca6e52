"""Package metadata of qatkit; settings of the tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "qatkit" / "version.py").read_text())[0]

ONNX = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.3"]
VISION = ["torchvision>=0.21", "scikit-learn", "tqdm", "pillow"]
REPORT = ["matplotlib"]
SAVE = ["safetensors>=0.4"]
ALL = [*ONNX, *VISION, *REPORT, *SAVE]
DEV = [
    *ALL,
    "pytest>=8.2",
    "pytest-xdist",
    "hypothesis",
    "mypy>=1.11",
    "ruff>=0.9",
    "build",
    "setuptools>=77",
]

setup(
    name="qatkit",
    version=VERSION,
    description="Quantization-aware training for PyTorch, up to a verified QDQ ONNX file",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["qatkit", "qatkit.*"]),
    package_data={"qatkit": ["py.typed"]},
    zip_safe=False,
    install_requires=["torch>=2.6", "numpy", "numba>=0.60"],
    extras_require={
        "onnx": ONNX,
        "vision": VISION,
        "report": REPORT,
        "save": SAVE,
        "all": ALL,
        "dev": DEV,
        "pytorch-quantization": ["pytorch-quantization"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
