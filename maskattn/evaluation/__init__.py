"""Evaluation: predictions of patients, splits of the patients, and metrics with their intervals.

It uses numpy, scipy, scikit-learn, scikit-survival and matplotlib; nothing here loads torch.
"""

from __future__ import annotations

from maskattn.evaluation.predictions import TASKS, Predictions
from maskattn.evaluation.splits import LeakError, Split, grouped_folds, strata_of

__all__ = ["TASKS", "LeakError", "Predictions", "Split", "grouped_folds", "strata_of"]
