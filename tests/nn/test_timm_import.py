"""timm is imported without torch's compiler and the hub's client, which work afterwards as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("timm", reason="the import of timm is what is tested")

# The library that goes with the operators' names must last as long as torchvision.
START = """
import sys, threading
from maskattn.torchvision_names import name_operators
names = name_operators()
import torch
from maskattn.nn.timm_import import import_timm
"""


def run(code: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_encoder_of_timm_is_loaded_without_the_compiler() -> None:
    code = """
from maskattn.nn.encoders import load_encoder
encoder = load_encoder("timm:vit_tiny_patch16_224", pretrained=False)
unwanted = {"torch._dynamo", "torch._dynamo.utils", "sympy", "huggingface_hub.hf_api"}
print(encoder.why_not or "packed", *(unwanted & sys.modules.keys()))
"""
    assert run(code) == ["packed"]


def test_the_hubs_client_is_imported_when_timm_calls_it() -> None:
    pytest.importorskip("huggingface_hub", reason="its client is what timm calls")
    code = """
timm = import_timm()
import huggingface_hub
assert timm.models._hub.has_hf_hub() and "huggingface_hub.hf_api" not in sys.modules
assert not {"HfApi", "hf_hub_download", "model_info"} & vars(huggingface_hub).keys()
assert huggingface_hub.HfApi is sys.modules["huggingface_hub.hf_api"].HfApi
api = timm.models._hub.HfApi(token="none", library_name="timm")
assert type(api) is huggingface_hub.HfApi and api.token == "none" and api.library_name == "timm"
try:
    timm.models._hub.hf_hub_download(repo_id="no/such/name", filename="config.json")
except huggingface_hub.errors.HFValidationError as error:
    print("no/such/name" in str(error))
called = []
huggingface_hub.hf_hub_download = lambda *args, **kwargs: called.append((args, kwargs)) or "file"
assert timm.models._hub.hf_hub_download("a/b", filename="f") == "file"
assert called == [(("a/b",), {"library_name": "timm", "library_version": timm.__version__, "filename": "f"})], called
"""
    assert run(code) == ["True"]


def test_the_compiler_and_what_is_kept_from_it_work_afterwards() -> None:
    code = """
disable = torch.compiler.disable
timm = import_timm()
assert torch.compiler.disable is disable and "torch._dynamo" not in sys.modules
from torchvision.ops.roi_align import is_compile_supported
assert is_compile_supported("cpu") is True and "torch._dynamo" in sys.modules
assert torch._dynamo.utils.is_compile_supported("cpu") is True
from timm.layers import disable_compiler
seen = []

@disable_compiler
def kept_from_it(x):
    seen.append(torch.compiler.is_compiling())
    return x + 1

@disable_compiler(recursive=False)
def also(x):
    seen.append(torch.compiler.is_compiling())
    return x + 1

compiled = torch.compile(lambda x: also(kept_from_it(x * 2)) * 3, backend="eager")
assert compiled(torch.ones(2)).tolist() == [12.0, 12.0] and seen == [False, False], seen
assert kept_from_it.__name__ == "kept_from_it"
"""
    assert run(code) == []


def test_beside_another_thread_or_with_the_compiler_nothing_is_replaced() -> None:
    for before in (
        "import torch._dynamo",
        "waits = threading.Event(); threading.Thread(target=waits.wait, daemon=True).start()",
    ):
        assert run(f"{before}\nimport_timm()\nprint('torch._dynamo' in sys.modules)") == ["True"]
