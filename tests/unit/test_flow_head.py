"""Flow matching: the conventions, and a head that keeps draws apart."""

import numpy as np
import pytest
import torch

from dualvla.models.config import HeadConfig
from dualvla.models.flow_head import FlowHead, draw_tau, euler, interpolate


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_integrating_the_exact_field_lands_on_the_action(steps: int) -> None:
    action, noise = torch.randn(5, 4, 7), torch.randn(5, 4, 7)
    landed = euler(lambda a, tau: (action - a) / (1 - tau[:, None, None]), noise, steps)
    torch.testing.assert_close(landed, action, atol=1e-5, rtol=0)


def test_the_path_starts_at_noise_ends_at_data_and_moves_at_the_target_velocity() -> None:
    action, noise = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    assert torch.equal(interpolate(action, noise, torch.zeros(2)), noise)
    assert torch.equal(interpolate(action, noise, torch.ones(2)), action)
    here, there = (interpolate(action, noise, torch.full((2,), tau)) for tau in (0.3, 0.4))
    torch.testing.assert_close((there - here) / 0.1, action - noise, atol=1e-5, rtol=1e-4)


def test_tau_puts_its_weight_on_noisy_times() -> None:
    tau = draw_tau(np.random.default_rng(0), 200_000, 0.999)
    assert tau.mean() == pytest.approx(0.40, abs=0.005)
    assert (tau < 0.5).mean() == pytest.approx(0.65, abs=0.005)
    assert tau.min() >= 0
    assert tau.max() <= 0.999


@pytest.fixture(scope="module")
def head() -> FlowHead:
    torch.manual_seed(0)
    made = FlowHead(HeadConfig(hidden=32, layers=2, heads=2), 16, horizon=4, action_dim=7, proprio_dim=3)
    torch.nn.init.normal_(made.velocity_out.weight)
    return made.eval()


def test_each_draw_is_alone(head: FlowHead) -> None:
    latents, proprio = torch.randn(2, 5, 16), torch.randn(2, 3)
    noisy, tau = torch.randn(2, 6, 4, 7), torch.rand(2, 6)
    context = head.context(latents, proprio)
    together = head.velocity(context, noisy, tau)
    for k in range(6):
        alone = head.velocity(context, noisy[:, k : k + 1], tau[:, k : k + 1])
        torch.testing.assert_close(alone[:, 0], together[:, k], atol=1e-5, rtol=1e-5)


def test_the_context_never_sees_the_chunk_but_the_chunk_sees_all_of_it(head: FlowHead) -> None:
    latents, proprio = torch.randn(1, 5, 16), torch.randn(1, 3)
    noisy, tau = torch.randn(1, 1, 4, 7), torch.rand(1, 1)
    base = head.velocity(head.context(latents, proprio), noisy, tau)
    for changed in ((latents + 1, proprio), (latents, proprio + 1)):
        assert not torch.allclose(head.velocity(head.context(*changed), noisy, tau), base)
    keys = [k for k, _ in head.context(latents, proprio)]
    other = [k for k, _ in head.context(latents, proprio + 1)]
    # block-wise causal: proprioception comes last, so the latent block's keys do not depend on it
    assert all(torch.equal(a[..., :5, :], b[..., :5, :]) for a, b in zip(keys, other, strict=True))
    assert not torch.equal(keys[-1][..., 5:, :], other[-1][..., 5:, :])
