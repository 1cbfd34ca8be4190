"""Installation: the base package runs an exported model; ``[train]`` adds the engine."""

from setuptools import find_packages, setup

EXTRAS = {
    "train": ["deepspeed>=0.19.4", "ninja"],
    "gpu": ["triton", "flash-attn", "torchaudio", "liger-kernel"],
    "demo": ["espeakng-loader", "psutil"],
    "adapters": ["peft", "lhotse"],
    "cluster": ["ray"],
    # what Kyutai's package needs; it pins an older torch, so itself comes by: pip install --no-deps moshi
    "moshi": ["einops", "sentencepiece", "sphn"],
    "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "triton", "scipy", "lhotse"],
    "dev": ["ruff", "mypy", "import-linter", "pre-commit", "types-PyYAML"],
}

setup(
    name="megatron_omni",
    version="0.1.0",
    description="Training omni speech language models: ZeRO-3 x tensor parallelism, tar shards, Mimi targets",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_omni", "megatron_omni.*"]),
    package_data={"megatron_omni": ["py.typed", "**/*.html", "data/sources/presets/*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "webdataset",
        "numpy",
        "soundfile",
        "soxr",
        "fsspec[http]",
        "filelock",
        "datasets",
        "orjson",
        "xxhash",
        "tenacity",
        "safetensors",
        "tokenizers",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "typer",
        "wandb",
        "jiwer",
        "plotly",
        "jinja2",
    ],
    extras_require=EXTRAS,
)
