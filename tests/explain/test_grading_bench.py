"""The grading experiment: its cohort holds what it says, its arms differ by their masks, and it can be resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

for module in ("cv2", "sklearn", "scipy", "matplotlib"):
    pytest.importorskip(module)

from bench.evidence.cohort import (  # noqa: E402 (what may be missing is skipped first)
    GRADES,
    KINDS,
    LESION_SHARE,
    SHARES_OF_B,
    draw_cohort,
    draw_slide,
)
from bench.evidence.grading import QUICK, main  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.grading_maps import MAPS, attention_of, judge_maps  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.grading_model import (  # noqa: E402 (what may be missing is skipped first)
    GRID_OF_REGIONS,
    MASKED,
    PLAIN,
    REGION_PX,
    Levels,
    as_tensors,
    encode,
    grades_of,
    hipt_of,
    new_patch_encoder,
    new_upper_levels,
    probabilities,
    regions_of,
    whitened,
)
from bench.evidence.grading_real import MARKS, encode_masked, on_glass, scores_of  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.grading_tables import kappa, kappas_of_resamples, over_seeds  # noqa: E402 (what may be missing is skipped first)
from bench.evidence.real_images import Crops  # noqa: E402 (what may be missing is skipped first)
from maskattn.nn import VisionTransformer  # noqa: E402 (what may be missing is skipped first)


@pytest.fixture(scope="module")
def cohort():
    return draw_cohort(3, GRADES, "inside", marks_tell=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    encoder, upper = new_patch_encoder().eval(), new_upper_levels().eval()
    for parameter in (*encoder.parameters(), *upper.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return hipt_of(encoder.requires_grad_(False), upper.requires_grad_(False))


def test_the_patterns_lie_on_the_tissue_in_the_shares_that_the_grade_says():
    for grade in range(GRADES):
        for seed in range(3):
            _, kinds = draw_slide(seed, grade, "inside", marks_tell=True)
            count = {kind: int((kinds == index).sum()) for index, kind in enumerate(KINDS)}
            lesion = count["pattern A"] + count["pattern B"]
            assert (lesion > 0) == (grade > 0)
            if grade:
                low, high = SHARES_OF_B[grade]
                assert low - 0.02 <= count["pattern B"] / lesion <= high + 0.02
                assert LESION_SHARE[0] - 0.01 <= lesion / (lesion + count["benign"]) <= LESION_SHARE[1] + 0.01


def test_the_centres_share_tissue_and_differ_in_scanner_and_marks(cohort):
    again = draw_cohort(3, GRADES, "inside", marks_tell=True)
    assert np.array_equal(again.images_S3XY, cohort.images_S3XY)
    outside = draw_cohort(3, GRADES, "outside", marks_tell=False)
    assert np.array_equal(outside.tissue, cohort.tissue)
    assert np.array_equal(outside.pattern("pattern B"), cohort.pattern("pattern B"))
    assert not np.array_equal(outside.images_S3XY, cohort.images_S3XY)


def test_ink_goes_with_the_grade_where_marks_tell_and_nowhere_else():
    ink = {}
    for tell in (True, False):
        marked = draw_cohort(11, 10 * GRADES, "inside", marks_tell=tell, slides_a_patient=(1, 1))
        amount = marked.shares_SMHW[:, KINDS.index("mark")].astype(np.float64).sum(axis=(1, 2))
        ink[tell] = np.corrcoef(amount, marked.grades_S)[0, 1]
    assert ink[True] > 0.5
    assert abs(ink[False]) < 0.35


def test_tokens_with_tissue_hold_no_mark_unless_pens_run_over_it():
    for over_tissue in (False, True):
        clean, _ = draw_slide(4, 5, "inside", marks_tell=True, over_tissue=over_tissue)
        other = draw_cohort(4, GRADES, "inside", marks_tell=True, over_tissue=over_tissue)
        marks = other.shares_SMHW[:, KINDS.index("mark")] > 0
        assert clean.dtype == np.uint8
        if not over_tissue:
            assert not (marks & other.tissue).any()


def test_masked_predictions_do_not_know_glass_and_plain_ones_do(cohort, model):
    data = as_tensors(cohort)
    upper = torch.nn.ModuleDict({"region": model.region_encoder, "slide": model.slide_encoder})

    def predict(data, levels):
        return probabilities(upper, encode(model.patch_encoder, data, levels.tokens), data.keep_patches(levels))

    white = whitened(data)
    assert not torch.equal(white.pixels_SRN3pp, data.pixels_SRN3pp)
    assert torch.equal(predict(data, MASKED), predict(white, MASKED))
    assert torch.equal(predict(data, Levels(True, False, False)), predict(white, Levels(True, False, False)))
    for levels in (PLAIN, Levels(False, True, True), Levels(False, False, True)):
        assert not torch.equal(predict(data, levels), predict(white, levels))


def test_features_and_upper_levels_are_the_packages_hipt(cohort, model):
    data = as_tensors(cohort)
    upper = torch.nn.ModuleDict({"region": model.region_encoder, "slide": model.slide_encoder})
    ours = probabilities(upper, encode(model.patch_encoder, data, True), data.keep_patches(MASKED))
    regions = regions_of(torch.from_numpy(cohort.images_S3XY[5:6]), REGION_PX)[0]
    keep = regions_of(torch.from_numpy(cohort.tissue[5:6])[:, None], REGION_PX // 8)[0, :, 0]
    with torch.no_grad():
        embeddings, kept = model.encode_regions(regions, keep)
        theirs = model(embeddings, kept.view(GRID_OF_REGIONS)).sigmoid()
    torch.testing.assert_close(ours[5], theirs, rtol=1e-4, atol=1e-5)


def test_joint_attention_is_a_distribution_that_masked_has_none_of_on_glass(cohort, model):
    tissue = torch.from_numpy(cohort.tissue[6])
    regions = regions_of(torch.from_numpy(cohort.images_S3XY[6:7]), REGION_PX)[0]
    for masked in (False, True):
        keep_HW = tissue if masked else torch.ones_like(tissue)
        keep = regions_of(keep_HW[None, None], REGION_PX // 8)[0, :, 0].contiguous()
        joint = attention_of(model, regions, keep)
        assert joint.shape == tissue.shape
        assert joint.sum().item() == pytest.approx(1, abs=1e-4)
        assert (joint[~tissue] == 0).all() == masked


def test_maps_of_a_masked_model_are_judged_on_the_slide_and_on_its_tissue(cohort, model):
    found = judge_maps(model, cohort, MASKED, 3)
    assert found["attention on glass"] == [0.0] * 3
    for name in (*MAPS, "random"):
        whole, tissue = (found[f"tumour|{where}|{name}"] for where in ("whole slide", "tissue"))
        assert len(whole) == len(tissue) == 3
        assert all(0 < value <= 1 for value in (*whole, *tissue))
        # With glass left out there are fewer tokens to be wrong about.
        assert all(t >= w - 1e-9 for w, t in zip(whole, tissue, strict=True))


def test_grades_are_of_patients_from_the_means_of_their_slides():
    slides = torch.tensor([[0.9, 0.6], [0.2, 0.3], [0.9, 0.9]])
    assert grades_of(slides, torch.tensor([0, 0, 1])).tolist() == [1, 2]


def test_kappas_of_resamples_are_sklearns():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, GRADES, (2, 40))
    rows = rng.integers(0, 40, (3, 40))
    counts = np.stack([np.bincount(r, minlength=40) for r in rows])
    expected = [kappa(truth[r].tolist(), predicted[r].tolist()) for r in rows]
    np.testing.assert_allclose(kappas_of_resamples(truth, predicted, counts), expected, atol=1e-12)


def test_the_interval_over_seeds_is_students():
    mean, half = over_seeds([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-5))
    assert np.isnan(over_seeds([1.0])[1])


def test_real_pieces_are_the_same_whatever_the_marks_and_masked_features_too():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(4, 3, 224, 224, generator=rng) / 2
    malignant = torch.tensor([True, False, True, False])
    squares = Crops(list("abcd"), list("wxyz"), pixels, malignant, torch.zeros(4, 224, 224, dtype=torch.bool))
    images = {marks: on_glass(squares, marks, seed=1) for marks in MARKS}
    vit = VisionTransformer(img_size=224, patch_size=16, embed_dim=16, depth=1, num_heads=2).eval()
    told, tissue = images[MARKS[0]]
    keep = torch.nn.functional.adaptive_max_pool2d(tissue[:, None].float(), 14)[:, 0] > 0
    for other, same in list(images.values())[1:]:
        assert torch.equal(same, tissue)
        assert torch.equal(other * tissue[:, None], told * tissue[:, None])
        assert torch.equal(encode_masked(vit, other, keep), encode_masked(vit, told, keep))
    assert not torch.equal(images["none"][0], told)


def test_a_probe_is_asked_about_patients_that_it_has_not_seen():
    malignant = torch.tensor([True, False, True, False, True])
    squares = Crops(list("abcde"), list("vwxyz"), torch.zeros(5, 3, 1, 1), malignant, torch.zeros(5, 1, 1))
    # The last image contradicts the rest: a probe that had seen it alone could place it well.
    features = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [-9.0]])
    assert scores_of(features, features, squares, strength=1.0)[4] < 0


@pytest.fixture
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_threads_as_before")
def test_the_bench_runs_to_the_end_and_resumes_where_it_stopped(tmp_path, monkeypatch, capsys):
    def lines(*more: str) -> list[str]:
        names = ["plain", "masked", "masked at inference alone"]
        command = ["grading", "--quick", "--run", str(tmp_path), "--seeds", "0", "1", "--arms", *names, *more]
        monkeypatch.setattr("sys.argv", command)
        main()
        said = capsys.readouterr().out
        for text in (
            "| masked less plain |",
            "Average precision against pattern B",
            "| masked at inference alone | 2 |",
        ):
            assert text in said
        return [line for line in said.splitlines() if line.startswith("|")]

    first = lines()
    kept = tmp_path / "quick" / "seed1" / "masked.json"
    result = json.loads(kept.read_text())
    assert len(result["predicted"]["outside"]) == QUICK.test_patients
    (tmp_path / "quick" / "seed0" / "masked.json").unlink()
    assert lines() == first
    assert json.loads(kept.read_text()) == result
    assert lines("--write") == first
    (tmp_path / "quick" / "plan.json").write_text("{}")
    with pytest.raises(SystemExit, match="of other sizes"):
        lines()
