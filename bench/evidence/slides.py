"""The effect of masking background on a slide classifier: its accuracy, and where its maps point.

    python -m bench.evidence.slides            # draws slides, trains, judges, writes the table and the figure

Synthetic slides (maskattn.demo.synthetic; benign against low, whose lesions are subtle) are read entirely at 4 µm/px,
in tokens of 64 µm. A masked and a plain vision transformer, which are otherwise identical, are trained on clean slides,
and on slides with a pen stroke on the glass that agrees with the class. Both are tested on fresh slides, clean and with
uninformative strokes. Strokes keep a token's distance from the tissue, so that the mask is judged and not tissue
detection. Everything is seeded; a run takes about fifteen minutes on two cores.

Dimension key: B slides, H·W grid tokens.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score
from torch import Tensor

from bench.evidence.figures import lay_over
from bench.evidence.table import Row, as_tensor, markdown_table, write_section
from maskattn.demo.synthetic import CLASSES, make_slide
from maskattn.explain import CDAM, AttentionMap, IntegratedCDAM
from maskattn.explain.metrics import background_mass
from maskattn.nn import VisionTransformer

SLIDE_PX, REDUCTION, TOKEN_PX = 768, 4, 16
IMAGE_PX, GRID = SLIDE_PX // REDUCTION, SLIDE_PX // REDUCTION // TOKEN_PX
STROKE_COLOUR = (200, 30, 40)  # red: the pens that mark glass at random in all slides are blue, green and black
FIRST_TEST_SEED = 500_000


@dataclass(frozen=True)
class Slides:
    """Entire slides as images.

    Attributes:
        clean_BIXY, marked_BIXY: (B, 3, 192, 192) uint8, the same slides without and with a stroke on the glass.
        keep_BHW: (B, H, W) bool, tokens with tissue.
        lesion_BHW: (B, H, W) bool, tokens at least half lesion.
        label_B: (B,) int64, 1 = there is a lesion.
    """

    clean_BIXY: Tensor
    marked_BIXY: Tensor
    keep_BHW: Tensor
    lesion_BHW: Tensor
    label_B: Tensor

    def images(self, marked_B: Tensor) -> Tensor:
        """Return float images, marked or clean, with a mean of about zero."""
        pixels = torch.where(marked_B[:, None, None, None], self.marked_BIXY, self.clean_BIXY)
        return pixels.float() / 127.5 - 1


def draw(seed: int, lesion_class: str = "high") -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Draw one slide: clean image, marked image, tissue tokens, lesion tokens and label."""
    label = seed % 2
    slide = make_slide(seed, label * CLASSES.index(lesion_class), SLIDE_PX)
    marked = slide.image_HW3.copy()
    near = cv2.dilate(slide.tissue_HW.astype(np.uint8), np.ones((2 * TOKEN_PX * REDUCTION + 1,) * 2, np.uint8)) > 0
    stroke = np.zeros(slide.tissue_HW.shape, np.uint8)
    rng = np.random.default_rng(seed)
    for _ in range(6):  # strokes are clipped to the glass, and some may be entirely on tissue
        ends = rng.integers(0, SLIDE_PX, (2, 2))
        cv2.line(stroke, tuple(map(int, ends[0])), tuple(map(int, ends[1])), 1, int(rng.integers(24, 40)))
        if (stroke.astype(bool) & ~near).sum() > 6000:
            break
    marked[stroke.astype(bool) & ~near] = STROKE_COLOUR
    small = [cv2.resize(x, (IMAGE_PX, IMAGE_PX), interpolation=cv2.INTER_AREA) for x in (slide.image_HW3, marked)]
    shares = [
        cv2.resize(x.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA)
        for x in (slide.tissue_HW, slide.lesion_HW)
    ]
    clean, with_stroke = (x.transpose(2, 0, 1) for x in small)
    return clean, with_stroke, shares[0] > 0, shares[1] >= 0.5, label


def draw_slides(first_seed: int, count: int, lesion_class: str) -> Slides:
    """Draw slides of consecutive seeds, half of them benign."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        drawn = list(
            pool.map(partial(draw, lesion_class=lesion_class), range(first_seed, first_seed + count), chunksize=20)
        )
    clean, marked, keep, lesion = (torch.from_numpy(np.stack(column)) for column in list(zip(*drawn, strict=True))[:4])
    return Slides(clean, marked, keep, lesion, torch.tensor([row[4] for row in drawn]))


def new_model() -> VisionTransformer:
    """Return an untrained class-token ViT of three blocks for entire slides."""
    return VisionTransformer(
        img_size=IMAGE_PX, patch_size=TOKEN_PX, num_classes=2, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0
    ).eval()


def train(slides: Slides, masked: bool, telling: float, seed: int, steps: int, batch: int = 32) -> VisionTransformer:
    """Train a class-token ViT of three blocks; everything but the mask and the strokes is the same for all.

    ``telling`` is the share of slides whose stroke agrees with their class; for 0, no slide has a stroke.
    """
    torch.manual_seed(seed)
    model = new_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(steps, 1), pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    true_B = torch.rand(len(slides.label_B), generator=generator) < telling
    marked = true_B == slides.label_B.bool() if telling else torch.zeros_like(true_B)
    images = slides.images(marked)
    for _ in range(steps):
        pick = torch.randint(len(images), (batch,), generator=generator)
        turns, flip = torch.randint(4, (1,), generator=generator).item(), torch.rand(1, generator=generator) < 0.5
        x, keep = (torch.rot90(t[pick], int(turns), (-2, -1)) for t in (images, slides.keep_BHW))
        x, keep = (t.flip(-1) if flip else t for t in (x, keep))
        loss = F.cross_entropy(model(x, keep if masked else None), slides.label_B[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if steps:
        print(f"masked={masked}, telling={telling}, seed={seed}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def for_lesion(logits_B2: Tensor) -> Tensor:
    """Return the explained score: the difference of the logits, on which a softmax of two classes depends."""
    return logits_B2[:, 1] - logits_B2[:, 0]


def judge(model: VisionTransformer, slides: Slides, images: Tensor, masked: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Compute metrics of each slide, and its attention map and its map for the lesion, (B, 2, H, W)."""
    keeps = slides.keep_BHW if masked else torch.ones_like(slides.keep_BHW)
    batches = list(zip(images.split(50), keeps.split(50), strict=True))
    with torch.no_grad():
        right = torch.cat([model(x, keep) for x, keep in batches]).argmax(dim=1) == slides.label_B
    attention = torch.cat([AttentionMap(model).attribute(x, keep) for x, keep in batches])
    relevance = torch.cat([CDAM(model).attribute(x, for_lesion, keep) for x, keep in batches])
    integrated = torch.cat([IntegratedCDAM(model, 20, "norm").attribute(x, for_lesion, keep) for x, keep in batches])
    background = ~slides.keep_BHW
    values = {
        "accuracy": right.double(),
        "attention on glass": background_mass(attention, background),
        "CDAM on glass": background_mass(relevance, background),
        "AP of attention": precisions(attention, slides, inside_tissue=False),
        "AP of CDAM": precisions(relevance, slides, inside_tissue=False),
        "AP of Integrated CDAM, norm": precisions(integrated, slides, inside_tissue=False),
        "AP in tissue: attention": precisions(attention, slides, inside_tissue=True),
        "CDAM": precisions(relevance, slides, inside_tissue=True),
        "Integrated CDAM, norm": precisions(integrated, slides, inside_tissue=True),
    }
    return values, torch.stack([attention, relevance], dim=1)


def precisions(maps_BHW: Tensor, slides: Slides, inside_tissue: bool) -> Tensor:
    """Compute the average precision of each map against the lesion's tokens; NaN without a lesion."""
    found = []
    for values, lesion, keep in zip(maps_BHW, slides.lesion_BHW, slides.keep_BHW, strict=True):
        area = keep if inside_tissue else torch.ones_like(keep)
        known = bool(lesion[area].any())
        found.append(average_precision_score(lesion[area], values[area]) if known else float("nan"))
    return as_tensor(found)


def draw_figure(images: Tensor, lesions: Tensor, maps: dict[str, Tensor], path: Path) -> None:
    """Draw a row for each slide: image, lesion, and attention and relevance of each model."""
    columns = [(name, kind) for kind in range(2) for name in maps]
    figure = Figure(figsize=(1.75 * (len(columns) + 2), 1.75 * len(images) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), len(columns) + 2, squeeze=False)
    for row, (image, lesion) in enumerate(zip(images, lesions, strict=True)):
        pixels = ((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()
        axes[row, 0].imshow(pixels)
        axes[row, 1].imshow(lesion.numpy(), cmap="gray_r", extent=(0, IMAGE_PX, IMAGE_PX, 0))
        for axis, (name, kind) in zip(axes[row, 2:], columns, strict=True):
            lay_over(axis, pixels.mean(axis=2), maps[name][row, kind].numpy(), signed=kind == 1)
    titles = ["slide", "lesion", *(f"{('attention', 'CDAM, lesion')[kind]},\n{name}" for name, kind in columns)]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Draw, train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training-slides", type=int, default=600)
    parser.add_argument("--test-slides", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--lesion", choices=CLASSES[1:], default="low", help="the class that is not benign")
    parser.add_argument(
        "--telling", type=float, default=1.0, help="share of training strokes that agree with the class"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    parser.add_argument("--cache", type=Path, help="file for the drawn slides, which are loaded if it exists")
    arguments = parser.parse_args()
    if arguments.cache is not None and arguments.cache.exists():
        training, testing = (Slides(*part) for part in torch.load(arguments.cache))
    else:
        training = draw_slides(0, arguments.training_slides, arguments.lesion)
        testing = draw_slides(FIRST_TEST_SEED, arguments.test_slides, arguments.lesion)
        if arguments.cache is not None:
            torch.save([list(vars(part).values()) for part in (training, testing)], arguments.cache)
    strokes = torch.rand(len(testing.label_B), generator=torch.Generator().manual_seed(1)) < 0.5
    tests = {"clean": testing.images(torch.zeros_like(strokes)), "stray strokes": testing.images(strokes)}
    rows, shown = [], {}
    for masked in (False, True):
        values, _ = judge(train(training, masked, 0.0, 0, steps=0), testing, tests["clean"], masked)
        rows.append(Row(f"untrained: {'masked' if masked else 'plain'}", values))
    shown_slides = (strokes & testing.lesion_BHW.flatten(1).any(1)).nonzero().flatten()[:3]
    for telling in (0.0, arguments.telling):
        judged: dict[tuple[str, bool], list[dict[str, Tensor]]] = {}
        for masked in (False, True):
            for seed in range(arguments.seeds):
                model = train(training, masked, telling, seed, arguments.steps)
                for name, images in tests.items():
                    values, maps = judge(model, testing, images, masked)
                    judged.setdefault((name, masked), []).append(values)
                    if telling and seed == 0 and name == "stray strokes":
                        shown["masked" if masked else "plain"] = maps[shown_slides]
        for name in tests:
            for masked in (False, True):
                parts = judged[name, masked]
                trained = "telling strokes" if telling else "clean"
                label = f"trained on {trained}, tested on {name}: {'masked' if masked else 'plain'}"
                rows.append(Row(label, {m: torch.cat([part[m] for part in parts]) for m in parts[0]}))
    figure = arguments.page.parent / "images" / "evidence_slides.png"
    draw_figure(tests["stray strokes"][shown_slides], testing.lesion_BHW[shown_slides], shown, figure)
    lesions = testing.lesion_BHW.flatten(1).any(1)
    in_tissue = testing.lesion_BHW[lesions].sum() / testing.keep_BHW[lesions].sum()
    share = testing.lesion_BHW[lesions].float().mean()
    table = markdown_table(rows)
    text = (
        f"Benign against {arguments.lesion}. {len(testing.label_B)} test slides and {arguments.seeds} trainings of "
        f"each model on {len(training.label_B)} slides; mean ± standard error over slides and trainings. A map of "
        f"noise has an average precision (AP) of about {share:.2f}, within the tissue {in_tissue:.2f}.\n\n{table}"
    )
    write_section(arguments.page, "slides", text)
    print(text)


if __name__ == "__main__":
    main()
