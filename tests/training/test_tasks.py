"""The losses of the tasks equal what others compute, and batches add up to what one large one would give."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pytorch_lightning")

from maskattn.nn.slide_models.ordinal import OrdinalHead, ordinal_logits
from maskattn.nn.slide_models.pooling import PooledHead
from maskattn.training.batches import CaseBatches
from maskattn.training.cohort import Case
from maskattn.training.tasks import ClassTask, SurvivalTask, ValueTask, cox_loss, task_of


def cases_of(truths: list[tuple[float, ...]]) -> list[Case]:
    return [Case(str(i), str(i), {str(i): Path(str(i))}, truth) for i, truth in enumerate(truths)]


def corn_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The paper's loss, task by task over the cases that have reached it, summed instead of averaged."""
    total = torch.zeros((), dtype=logits.dtype)
    for task in range(logits.shape[1]):
        reached = labels >= task
        on = (labels[reached] > task).to(logits.dtype)
        total = total + torch.nn.functional.binary_cross_entropy_with_logits(logits[reached, task], on, reduction="sum")
    return total


def test_ordinal_log_probabilities_give_corns_loss_and_sum_to_one() -> None:
    outputs = torch.randn(40, 4, dtype=torch.float64)
    labels = torch.randint(0, 5, (40,))
    logits = ordinal_logits(outputs)
    assert torch.allclose(logits.exp().sum(1), torch.ones(40, dtype=torch.float64))
    ours = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(ours, corn_loss(outputs, labels))


def test_ordinal_log_probabilities_stay_finite_far_out() -> None:
    outputs = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    logits = ordinal_logits(outputs)
    logits[:, 1].sum().backward()
    assert bool(logits.isfinite().all())
    assert bool(outputs.grad.isfinite().all())


def test_an_ordinal_head_is_a_head_of_one_class_more() -> None:
    head = OrdinalHead(PooledHead(6, 3)).eval()
    assert head.num_classes == 4
    again = OrdinalHead(**head.arguments()).eval()
    again.load_state_dict(head.state_dict())
    z = torch.randn(5, 6)
    assert torch.equal(head(z), again(z))


def plain_cox(risk: torch.Tensor, time: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    terms = [torch.logsumexp(risk[time >= time[i]], 0) - risk[i] for i in range(len(risk)) if event[i]]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("ties", [False, True])
def test_the_cox_loss_sums_over_everybody_who_is_still_at_risk(ties: bool) -> None:
    time = torch.randint(1, 6, (30,)).double() if ties else torch.rand(30, dtype=torch.float64)
    risk, event = torch.randn(30, dtype=torch.float64), torch.rand(30) < 0.6
    assert torch.allclose(cox_loss(risk, time, event), plain_cox(risk, time, event))


def test_the_cox_loss_is_least_where_scikit_survivals_model_is() -> None:
    from sksurv.linear_model import CoxPHSurvivalAnalysis

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 2))
    time = rng.exponential(np.exp(-x @ [1.0, -0.5]))
    event = rng.random(120) < 0.8
    outcome = np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])
    expected = CoxPHSurvivalAnalysis(alpha=0, ties="breslow").fit(x, outcome).coef_
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=100, tolerance_grad=1e-10)
    inputs, times, events = torch.from_numpy(x), torch.from_numpy(time), torch.from_numpy(event)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = cox_loss(inputs @ weights, times, events)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert weights.detach().numpy() == pytest.approx(expected, abs=1e-4)


def test_a_batch_without_an_event_moves_nothing() -> None:
    risk = torch.randn(4, requires_grad=True)
    cox_loss(risk, torch.rand(4), torch.zeros(4, dtype=torch.bool)).backward()
    assert not risk.grad.any()


def test_every_batch_of_a_survival_task_has_events_and_enough_patients() -> None:
    events = [index < 9 for index in range(50)]
    for epoch in range(5):
        batches = CaseBatches(50, 16, 3, events)
        batches.set_epoch(epoch)
        drawn = [[draw.index for draw in batch] for batch in batches]
        assert sorted(index for batch in drawn for index in batch) == list(range(50))
        assert len(drawn) == len(batches) == 3
        assert min(map(len, drawn)) >= 16
        assert min(sum(events[index] for index in batch) for batch in drawn) >= 2


def test_the_order_of_an_epoch_is_its_own_and_comes_again() -> None:
    batches = CaseBatches(20, 6, 1)
    orders = []
    for epoch in (0, 1, 2):
        batches.set_epoch(epoch)
        orders.append([draw.index for batch in batches for draw in batch])
    assert all(one != other for one, other in pairwise(orders))
    batches.set_epoch(1)
    assert [draw.index for batch in batches for draw in batch] == orders[1]


def test_processes_share_every_batch_and_none_is_idle() -> None:
    parts = [list(CaseBatches(10, 4, 0, None, rank, 2)) for rank in (0, 1)]
    assert [len(batch) for batch in parts[0]] == [len(batch) for batch in parts[1]] == [2, 2, 1]
    assert {draw.index for part in parts for batch in part for draw in batch} == set(range(10))


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 0, 0, 1, 2, 2])
    task = task_of("multiclass", 3, cases_of([(float(label),) for label in labels]), "balanced")
    assert isinstance(task, ClassTask)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert task.weights_K.numpy() == pytest.approx(expected)


def test_the_scores_of_slides_are_averaged_as_scores() -> None:
    outputs = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    fused = ClassTask(2).fuse(outputs)
    assert torch.allclose(fused.softmax(0), outputs.softmax(1).mean(0))
    assert SurvivalTask().fuse(outputs[:, :1]).tolist() == [2.0]


@pytest.mark.parametrize(
    ("name", "truths", "message"),
    [
        ("regression", [(3.0,)] * 4, "values that are learnt must differ, got 3 for all 4 cases"),
        ("survival", [(1.0, 0.0), (2.0, 1.0)], "must have 2 events or more to learn from, got 1"),
    ],
)
def test_what_cannot_be_learnt_is_refused(name: str, truths: list[tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(name, 1, cases_of(truths))


def test_class_weights_of_values_are_refused() -> None:
    with pytest.raises(ValueError, match="class weights need classes"):
        task_of("regression", 1, cases_of([(1.0,), (2.0,)]), "balanced")


def test_values_are_learnt_in_units_of_their_spread() -> None:
    task = task_of("regression", 1, cases_of([(10.0,), (20.0,)]))
    assert isinstance(task, ValueTask)
    assert task.loss(torch.tensor([[-1.0], [1.0]]), [(10.0,), (20.0,)]).item() == pytest.approx(0)
