"""Contenders of ``bench.cpu.end_to_end`` that encode one batch of tiles, each in a process of its own.

    python -m bench.cpu.encoder_contenders NETWORK DTYPE CONTENDER --threads 2

prints ``ready SECONDS`` after two batches that warm up (with the time to build it), the seconds of one batch for every
line that it reads (of a fast network, the mean of as many as take a third of a second), and at the end its peak memory.
Every contender starts from the same uint8 tiles and the same random weights and ends with float32 features.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import bench.without_torchvision  # noqa: F401 (before timm)
from bench.cpu.extract import own_peak_gib
from bench.held_to import held_to
from maskattn.demo.train import BUNDLED_MODEL
from maskattn.nn import TileEncoder, from_timm
from maskattn.nn.encoders import EncoderCard
from maskattn.nn.encoders.pixels import normalised
from maskattn.nn.inference_linear import packed_weights
from maskattn.nn.slide_model import SlideModel

Encode = Callable[[], Tensor]

NETWORKS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224", "bundled": ""}
DTYPES = ("float32", "bfloat16")
ALL_TOKENS, MASKED = "maskattn, all tokens", "maskattn, f = 0.3"
CONTENDERS = ("timm", "timm, compiled", "OpenVINO", "ONNX Runtime", ALL_TOKENS, MASKED)
KEPT = 0.3
_TIMED_S = 0.3
_HALF = torch.full((3,), 0.5)
_until_the_end = contextlib.ExitStack()  # a context manager that nobody holds is left at once


def why_not(contender: str, dtype: str) -> str:
    """Return why a contender cannot run here; empty if it can."""
    missing = {
        "OpenVINO": [name for name in ("openvino",) if find_spec(name) is None],
        "ONNX Runtime": [name for name in ("onnxruntime", "onnx", "onnxscript") if find_spec(name) is None],
    }.get(contender)
    if contender in ("OpenVINO", "ONNX Runtime") and held_to():
        return f"{contender} cannot be held to {held_to()}"
    if missing:
        return f"{contender} is not installed: pip install {' '.join(missing)}"
    if contender == "ONNX Runtime" and dtype == "bfloat16":
        return "ONNX Runtime has no bfloat16 matrix products for x86 processors"
    return ""


def network_of(title: str) -> tuple[nn.Module, int]:
    """Return timm's network with random weights, or the bundled encoder as timm's class, and the side of its tiles."""
    import timm  # after bench.without_torchvision

    torch.manual_seed(0)
    if NETWORKS[title]:
        return timm.create_model(NETWORKS[title], num_classes=0).eval(), 224
    model = SlideModel.load(BUNDLED_MODEL)
    network = timm.models.VisionTransformer(num_classes=0, **model.config.tile_encoder)
    network.load_state_dict(model.tile_encoder.state_dict())
    return network.eval(), model.config.tile_px


def kept_tokens(side: int, share: float = KEPT) -> Tensor:
    """Return a (side, side) mask that keeps a round patch of this share of the tokens."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = (rows - side / 2 + 0.4) ** 2 + (columns - side / 3) ** 2
    keep = torch.zeros(side * side, dtype=torch.bool)
    keep[distance.flatten().argsort()[: round(share * side * side)]] = True
    return keep.view(side, side)


def call_of(contender: str, title: str, dtype: str, batch: int) -> Encode:
    """Return the function that encodes a batch of random tiles."""
    network, side = network_of(title)
    tiles = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (batch, 3, side, side), dtype=np.uint8))
    if contender in (ALL_TOKENS, MASKED):
        return _ours(network, tiles, dtype, masked=contender == MASKED)
    if contender == "OpenVINO":
        return _openvino(network, tiles, dtype)
    if contender == "ONNX Runtime":
        return _onnx_runtime(network, tiles)
    called = torch.compile(network) if contender == "timm, compiled" else network

    def encode() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            features: Tensor = called(normalised(tiles, _HALF, _HALF)).float()
        return features

    return encode


def _ours(network: nn.Module, tiles: Tensor, dtype: str, *, masked: bool) -> Encode:
    side = tiles.shape[-1]
    card = EncoderCard("bench", "token", (0.5,) * 3, (0.5,) * 3, side, side, 0.5)
    encoder = TileEncoder(from_timm(network, copy=False), card).eval()
    _until_the_end.enter_context(packed_weights(encoder))  # as in a run over slides
    keep = kept_tokens(side // encoder.token_px).expand(len(tiles), -1, -1).contiguous() if masked else None

    def encode() -> Tensor:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with torch.inference_mode(), autocast:
            return encoder.encode_tiles(tiles, keep).float()

    return encode


def _openvino(network: nn.Module, tiles: Tensor, dtype: str) -> Encode:
    import openvino

    images = normalised(tiles, _HALF, _HALF)
    model = openvino.convert_model(network, example_input=images[:1])
    model.reshape(list(images.shape))
    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, by all threads
    }
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def encode() -> Tensor:
        return torch.from_numpy(compiled(normalised(tiles, _HALF, _HALF).numpy())[0])

    return encode


def _onnx_runtime(network: nn.Module, tiles: Tensor) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(network, (normalised(tiles, _HALF, _HALF),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def encode() -> Tensor:
        return torch.from_numpy(session.run(None, {name: normalised(tiles, _HALF, _HALF).numpy()})[0])

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--features", type=Path, help="file for the features of the last batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to the terminal
    os.dup2(2, 1)
    start = time.perf_counter()
    encode = call_of(arguments.contender, arguments.network, arguments.dtype, arguments.batch)
    encode()
    last = time.perf_counter()
    features = encode()
    now = time.perf_counter()
    repeats = max(1, math.ceil(_TIMED_S / (now - last)))
    print("ready", now - start, file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(repeats):
            encode()
        print((time.perf_counter() - start) / repeats, file=answers, flush=True)
    if arguments.features:
        np.save(arguments.features, features.numpy())
    print(own_peak_gib(), file=answers, flush=True)


if __name__ == "__main__":
    main()
