"""The loss terms against torch, finite differences and their definitions (Eq. 5 to 7)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualvla.distill.losses import divergence, flow_kd, flow_mse, token_kd
from dualvla.errors import UsageError
from dualvla.models.config import LossWeights

KINDS = ("forward", "reverse", "mixed", "jensen-shannon")


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


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_every_divergence_is_made_of_torchs_kl(temperature: float) -> None:
    student, teacher, _ = _logits(0, torch.float64)
    p = torch.distributions.Categorical(logits=teacher / temperature)
    q = torch.distributions.Categorical(logits=student / temperature)
    m = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
    kl = torch.distributions.kl_divergence
    expected = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "mixed": 0.3 * kl(p, q) + 0.7 * kl(q, p),
        "jensen-shannon": 0.3 * kl(p, m) + 0.7 * kl(q, m),
    }
    for kind in KINDS:
        ours = divergence(student, teacher, temperature, kind, mix=0.3)
        torch.testing.assert_close(ours, expected[kind], atol=1e-10, rtol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50), kind=st.sampled_from(KINDS))
def test_token_kd_is_zero_only_for_the_same_distribution(seed: int, shift: float, kind: str) -> None:
    student, teacher, mask = _logits(seed)
    assert token_kd(teacher + shift, teacher, mask, 2.0, kind=kind).item() == pytest.approx(0.0, abs=1e-4)
    assert token_kd(student, teacher, mask, 2.0, kind=kind).item() > 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
def test_masked_entries_change_neither_value_nor_gradient(seed: int, kind: str) -> None:
    student, teacher, mask = _logits(seed)
    student.requires_grad_(True)
    token_kd(student, teacher, mask, 2.0, kind=kind).backward()
    assert (student.grad[~mask] == 0).all()
    disturbed = torch.where(mask.unsqueeze(-1), teacher, 100.0 * teacher.flip(-1))
    assert token_kd(student, disturbed, mask, 2.0, kind=kind) == token_kd(student, teacher, mask, 2.0, kind=kind)


@pytest.mark.parametrize("mix", [0.0, 1.0, 1.5])
def test_a_mix_that_leaves_one_side_out_is_refused(mix: float) -> None:
    with pytest.raises(UsageError, match="divergence_mix"):
        LossWeights(divergence="jensen-shannon", divergence_mix=mix)
    LossWeights(divergence="reverse", divergence_mix=mix)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_token_kd_match_finite_differences(kind: str) -> None:
    student, teacher, mask = _logits(1, torch.float64)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: token_kd(s, teacher, mask, 2.0, kind=kind, mix=0.3), (student,))


def test_gradients_of_flow_kd_match_finite_differences() -> None:
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
