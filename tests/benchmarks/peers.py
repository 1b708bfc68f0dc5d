"""The Pythons of the others, each with what it needs and nothing of ours."""

import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

NEEDS = {
    # The last release that runs ErnieM; and Ray Data, for the pipeline as tutorials have it.
    "hf4": ["torch==2.13.0", "transformers==4.40.2", "sentencepiece", "ray[data]==2.60.0"],
    "new": [
        "torch==2.13.0",
        "transformers==5.23.0",
        "sentencepiece",
        "protobuf",
        "onnx==1.23.0",
        "onnxruntime==1.32.0",
        "openvino==2026.4.1",
        "ctranslate2==4.8.5",
    ],
}


def pythons(folder: Path, names: Iterable[str] = NEEDS) -> dict[str, Path]:
    """The interpreter of each; what is not there yet is installed, which takes minutes."""
    found = {}
    for name in names:
        needs = NEEDS[name]
        python = folder / name / "bin" / "python"
        if not python.exists():
            print(f"installing {', '.join(needs)} …", file=sys.stderr)
            venv.create(folder / name, with_pip=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *needs], check=True)
        found[name] = python
    return found
