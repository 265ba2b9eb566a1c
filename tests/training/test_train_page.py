"""The commands of docs/train.md run, in order, on a folder of small slides."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("timm")
pytest.importorskip("pytorch_lightning")
pytest.importorskip("openslide")

import timm
from PIL import Image
from safetensors.torch import save_file
from small_cohorts import write_table
from small_slides import tissue_image, write_slide

from maskattn.cli.app import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "train.md"


def commands() -> list[list[str]]:
    """The page's commands, line by line."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert all(line.startswith("maskattn ") for line in lines)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with slides and labels, as the page has them."""
    (tmp_path / "slides").mkdir()
    rows = []
    for index in range(18):
        grade = index % 3
        darker = np.clip(tissue_image(seed=index).astype(int) - 25 * grade, 0, 255).astype(np.uint8)
        write_slide(tmp_path / "slides" / f"s{index:03d}.tiff", darker, spacing_um=0.5)
        rows.append({"slide_id": f"s{index:03d}", "patient_id": f"p{index:02d}", "grade": grade})
    write_table(tmp_path / "labels.csv", rows)
    for index in range(12):
        folder = tmp_path / "patches" / ("benign", "tumour")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(tissue_image((64, 64), index))
        image.save(folder / f"p{index:02d}_0.png")
        Image.new("L", (64, 64), 255).save(folder / f"p{index:02d}_0_mask.png")
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(arguments: list[str]) -> list[str]:
    """The command with a small encoder for the page's, whose weights want an agreement."""
    if "uni2-h" in arguments:
        at = arguments.index("uni2-h")
        return [*arguments[:at], "timm:vit_tiny_patch16_224", "--weights", "tiny.safetensors", *arguments[at + 1 :]]
    return arguments


@pytest.mark.slow
def test_a_labs_way_from_slides_to_a_model(lab: Path) -> None:
    torch.set_num_threads(1)
    ran = commands()
    assert len(ran) >= 6
    for arguments in ran:
        more = ["--epochs", "2", "--width", "16"] if arguments[0] == "train" and "--epochs" not in arguments else []
        more = [] if "--config" in arguments else more
        result = CliRunner().invoke(app, [*stand_in(arguments), *more])
        assert result.exit_code == 0, f"{shlex.join(arguments)}\n{result.output}"
    assert len(list((lab / "predictions").glob("*/prediction.json"))) == 18
    assert (lab / "abmil_seed2" / "model.safetensors").is_file()
    for report in ("cv_vit", "cv_abmil", "comparison"):
        assert "Quadratic-weighted kappa" in (lab / report / "report.html").read_text(encoding="utf-8")
