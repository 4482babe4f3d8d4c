"""Metadata of the distribution, as literals; pyproject.toml configures tools only."""

from setuptools import find_packages, setup

setup(
    name="emoverse",
    version="0.1.0",
    description=(
        "Multistage multitask sentiment and emotion instruction tuning for multimodal language "
        "models: data shards, training under DeepSpeed ZeRO, evaluation"
    ),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        # `launch` is a common name: an index would let two distributions overwrite each other.
        "Private :: Do Not Upload",
    ],
    packages=find_packages(
        include=["data_shards", "data_shards.*", "emoverse", "emoverse.*", "launch", "launch.*"]
    ),
    package_data={
        "data_shards": ["py.typed", "pages/templates/**"],
        "emoverse": ["py.typed", "assets/**", "report/templates/**"],
        "launch": ["py.typed"],
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "av>=14",
        "deepspeed>=0.19",
        "fsspec>=2025.3",
        "httpx2>=2",
        "jinja2>=3.1",
        "numpy>=2",
        "peft>=0.21",
        "pillow>=11",
        "pydantic>=2.11",
        "ruamel.yaml>=0.18",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "submitit>=1.5",
        "tensorboard>=2.19",
        "torch>=2.13",
        "tqdm>=4.66",
        "transformers>=5.23",
        "webdataset>=1.0",
    ],
    extras_require={
        "demo": ["simplejpeg>=1.8"],
        # Checksums at many times zlib's speed.
        "fast": ["isal>=1.7"],
        # CUDA builds of torch bring their own; elsewhere it interprets and compiles for the tests.
        "kernels": ["triton>=3.6"],
        # Needs the CUDA toolkit and: pip install --no-build-isolation -e .[flash-attn]
        "flash-attn": ["flash-attn>=2.8"],
        # CMU-MOSEI's labels in the SDK's own format, csd (HDF5).
        "mosei": ["h5py>=3.12"],
        # Shard folders on s3://; http needs nothing more.
        "s3": ["s3fs>=2025.3"],
        "test": [
            "flask>=3",  # with flask-cors: moto's S3 server, of which its extra takes in far more
            "flask-cors>=5",
            "h5py>=3.12",
            "hypothesis>=6.100",
            "moto[s3]>=5",
            "mypy>=2",
            "playwright>=1.60",
            "pytest>=9,<9.2",  # pytest-xdist 3.8 cannot keep a file in one process under 9.2
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.17",
            "s3fs>=2025.3",
            "scikit-learn>=1.7",
        ],
        "wandb": ["wandb>=0.19"],
    },
    entry_points={"console_scripts": ["emoverse=launch.cli:main"]},
)
