"""The loss terms against torch, finite differences and their definitions (Eq. 5 to 7)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualvla.distill.losses import flow_kd, flow_mse, token_kd


def _logits(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(3, 5, 11, generator=g, dtype=dtype)
    teacher = torch.randn(3, 5, 11, generator=g, dtype=dtype)
    mask = torch.rand(3, 5, generator=g) < 0.6
    mask[0, 0] = True
    return student, teacher, mask


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_token_kd_is_torchs_kl_divergence(temperature: float) -> None:
    student, teacher, mask = _logits(0)
    total = 0.0
    for b, t in mask.nonzero().tolist():
        p = torch.distributions.Categorical(logits=teacher[b, t] / temperature)
        q = torch.distributions.Categorical(logits=student[b, t] / temperature)
        total += torch.distributions.kl_divergence(p, q).item()
    expected = temperature**2 * total / int(mask.sum())
    assert token_kd(student, teacher, mask, temperature).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50))
def test_token_kd_is_zero_only_for_the_same_distribution(seed: int, shift: float) -> None:
    student, teacher, mask = _logits(seed)
    assert token_kd(teacher + shift, teacher, mask, 2.0).item() == pytest.approx(0.0, abs=1e-4)
    assert token_kd(student, teacher, mask, 2.0).item() > 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_masked_entries_change_neither_value_nor_gradient(seed: int) -> None:
    student, teacher, mask = _logits(seed)
    student.requires_grad_(True)
    token_kd(student, teacher, mask, 2.0).backward()
    assert (student.grad[~mask] == 0).all()
    disturbed = torch.where(mask.unsqueeze(-1), teacher, teacher + 100.0)
    assert token_kd(student, disturbed, mask, 2.0) == token_kd(student, teacher, mask, 2.0)


def test_gradients_match_finite_differences() -> None:
    student, teacher, mask = _logits(1, torch.float64)
    # token_kd works in float32 inside, so finite differences need a coarse step
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda s: token_kd(s, teacher, mask, 2.0), (student,), eps=1e-2, atol=2e-3, nondet_tol=0.0
    )
    velocity = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    target, keep = torch.randn(3, 4, 7, dtype=torch.float64), torch.tensor([True, False, True])
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: flow_kd(v, target, keep, weight), (velocity,))


def test_an_empty_mask_gives_zero_with_a_gradient() -> None:
    student, teacher, mask = _logits(2)
    student.requires_grad_(True)
    loss = token_kd(student, teacher, torch.zeros_like(mask), 2.0)
    loss.backward()
    assert loss.item() == 0.0
    assert (student.grad == 0).all()


def test_flow_kd_is_half_of_the_flow_loss_towards_the_teacher() -> None:
    student, teacher = torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3, [True] * 3])
    assert flow_kd(student, teacher, mask).item() == pytest.approx(0.5 * flow_mse(student, teacher, mask).item())
    assert flow_kd(teacher, teacher, mask).item() == 0.0
    doubled = flow_kd(student, teacher, mask, weight=torch.full((4,), 2.0))
    assert doubled.item() == pytest.approx(2 * flow_kd(student, teacher, mask).item())


def test_the_mean_of_two_workers_is_the_loss_of_the_whole_batch() -> None:
    student, teacher, mask = _logits(3)
    mask[1:] = False  # uneven: the second worker has nothing
    mask[1, 2] = True
    whole = token_kd(student, teacher, mask, 2.0)
    count = mask.sum() / 2
    parts = [token_kd(student[s], teacher[s], mask[s], 2.0, count=count) for s in (slice(0, 1), slice(1, 3))]
    assert sum(p.item() for p in parts) / 2 == pytest.approx(whole.item(), rel=1e-6)
