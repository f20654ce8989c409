"""Packaging: what `pip install -e .` installs, and the extras. Tool settings live in pyproject.toml."""
from setuptools import find_packages, setup

SERVE = ["starlette>=0.46", "uvicorn>=0.35", "prometheus-client>=0.22", "flatbuffers>=24",  # jax.export.
         "llguidance>=1.8"]  # Structured output. 1.7 does not bound white space.
TEST = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "tensorboardX>=2.6", "jsonschema>=4.20",
        "httpx>=0.27", "openai>=2", *SERVE]

setup(
  name="assay-lm",
  version="0.1.0",
  description=("A JAX and TPU native research codebase for language models: text to a served model, "
               "proven at each step."),
  python_requires=">=3.11,<3.14",
  packages=find_packages(include=["model*", "data*", "infer*", "train*", "configs*", "experiments*"]),
  package_data={"experiments": ["page.css", "page.js"], "infer": ["page.html"]},
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",
    "array-record>=0.8",
    "sentencepiece>=0.2.1",
    "tokenizers>=0.22",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources",  # tensorflow-datasets imports it without declaring it.
    "pyarrow>=18",
    "zstandard>=0.23",
    "jinja2>=3.1.5",  # Chat templates. Older sandboxes leak.
    "safetensors>=0.5",
    "ml-collections>=1.1",
    "absl-py>=2.1",
    "numpy>=2",
    "scipy>=1.13",
    "packaging",
    "pyyaml>=6",
    "rich>=13",
    "matplotlib>=3.9",
    "wandb>=0.19",
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "rehearse": ["jax[tpu]"],  # libtpu, the compiler: no TPU is needed.
    "gpu": ["jax[cuda12]"],
    "hub": ["gguf>=0.17", "huggingface_hub>=0.34"],  # Quantised GGUF files; models by name.
    "sweep": ["duckdb>=1.4", "optuna>=4.5"],  # experiments.query; a search instead of a grid.
    "serve": SERVE,  # python -m infer.server.
    "eval": ["lm-eval>=0.4.13"],  # EleutherAI's task files: python -m infer.eval --tasks=FILE.yaml.
    "ray": ["ray>=2.50"],  # python -m experiments.sweep --on=ray.
    "tensorboard": ["tensorboardX>=2.6"],
    "test": TEST,
    "dev": [*TEST, "ruff>=0.8"],
  },
)
