"""Evaluation: predictions of patients, how patients are split, and metrics with their intervals.

Numpy, scipy and scikit-learn alone: nothing here loads torch.
"""

from __future__ import annotations

from maskattn.evaluation.predictions import TASKS, Predictions
from maskattn.evaluation.splits import LeakError, Split, grouped_folds, strata_of

__all__ = ["TASKS", "LeakError", "Predictions", "Split", "grouped_folds", "strata_of"]
