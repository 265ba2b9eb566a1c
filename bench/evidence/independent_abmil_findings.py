"""What was found about the ViTs of :mod:`bench.evidence.independent_abmil`, outside its cohort of the result."""

FINDINGS = """## Why a ViT's pooled AUC is lower

Found on four cohorts drawn like that of the choice, each cross-validated with two seeds (eight units; ± is the
standard error over them), with ABMIL and with copies of both ViTs that train many models at once:

- The loop differs only in clipped gradients: without dropout, `train` takes the steps of a plain loop with AdamW and
  clipping (`tests/training/test_beside_a_plain_loop.py`). Clipping to a norm of 1 changes the AUC of our ViT by 0.000 ±
  0.006 within folds and −0.008 ± 0.004 pooled, that of torch's by −0.009 ± 0.004 and −0.009 ± 0.005; with the class
  token below, torch's by 0.000 ± 0.003 and −0.003 ± 0.003.
- The module is not the cause. Within folds, our ViT and torch's are level (0.002 ± 0.003 apart), and ours, as it was,
  is 0.004 ± 0.003 below ABMIL. Pooled over folds it is 0.018 ± 0.006 below, and torch's 0.006 ± 0.003: most of it is
  between folds, whose models' logits differ in scale and offset. Divided by each fold's spread and centred between the
  medians of its classes, our logits' pooled AUC is 0.926 in place of 0.912, with 0.929 within folds.
- One first weight was a poor choice: timm's class token of about 1e-6, below the ε of LayerNorm. `train` now draws it
  from a standard normal distribution, as TransMIL and STAMP do. The lowest validation loss falls by 0.025 ± 0.006, the
  difference from ABMIL within folds becomes 0.001 ± 0.003, and the pooled one −0.010 ± 0.003. The AUCs before and after
  cannot be told apart (0.005 ± 0.004 within folds, 0.008 ± 0.006 pooled). Standard deviations of 0.02 and 0.2 were
  tried as well, and did not change the AUC within folds beyond chance either.
  `python -m bench.evidence.first_class_token` repeats the comparison in the independent loop.
- No gain in AUC beyond chance came from a cosine schedule, a rate of 0.0003, weight decay of 0.1 or 1, dropout of 0.3,
  dropping 0.3 or 0.5 of the tokens, or mean pooling (four units each).
- The temperature that `train` fits on each fold's validation part is not to blame: without it our ViT's pooled AUC is
  lower (0.927 in place of 0.933, three seeds in the cohort of the choice).

Compare models of few patients by the table by fold as well.

"""
