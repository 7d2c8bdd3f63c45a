"""Solvers on a flow whose solution is known, the schedule, guidance, and noise that belongs to an image."""

import pytest
import torch

from symbiotic_titan.flow.noise import noise_of_image
from symbiotic_titan.flow.path import interpolate, velocity_target
from symbiotic_titan.flow.solver import SOLVERS, SolverOptions, guided, solve, time_grid

MEAN, STD = 1.5, 0.5


def gaussian_velocity(x, t):
    """The velocity E[e - x_0 | x_t = x] of the flow between noise and data that are normal with MEAN and STD: exact."""
    mean, variance = (1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t**2
    gain = (t - (1 - t) * STD**2) / variance
    return gain * (x - mean) - MEAN


def exact_data(noise):
    """Where ``gaussian_velocity`` takes noise: the quantile of the data that is the noise's own."""
    return MEAN + STD * noise


def error_of(sampler, steps, shift=1.0):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    drawn = solve(gaussian_velocity, noise, SolverOptions(steps, sampler, shift, 1.0))
    return float((drawn - exact_data(noise)).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_twice_the_steps_divide_the_error_by_two_to_the_order(sampler, order, shift):
    errors = [error_of(sampler, steps, shift) for steps in (256, 512, 1024)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_heun_is_nearer_than_euler_with_as_many_velocities():
    assert error_of("heun", 16) < error_of("euler", 32) / 5


def test_a_straight_path_is_followed_exactly_in_one_step():
    data, noise = torch.randn(4, 6), torch.randn(4, 6)
    for sampler in SOLVERS:
        drawn = solve(
            lambda x, t: velocity_target(data, noise), noise, SolverOptions(1, sampler, 1, 1)
        )
        torch.testing.assert_close(drawn, data)


def test_a_solver_of_your_own_is_chosen_by_name():
    with SOLVERS.temporarily(jump=lambda velocity, x_t, t, t_next: x_t * 0 + t_next):
        jumped = solve(gaussian_velocity, torch.ones(2), SolverOptions(3, "jump", 1, 1))
    assert jumped.tolist() == [0, 0]


def test_the_state_at_a_timestep_is_what_training_shows_the_model_there():
    data, noise = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    seen = []

    def velocity(x, t):
        seen.append((x, t))
        return velocity_target(data, noise)

    solve(velocity, noise, SolverOptions(5, "euler", 2.0, 1.0))
    assert seen[0][1] == 1.0
    for x, t in seen:
        torch.testing.assert_close(x, interpolate(data, noise, torch.full((1, 3), t)))


def test_timesteps_fall_from_noise_to_data_and_a_shift_keeps_them_near_the_noise():
    assert time_grid(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = time_grid(4, 3.0)
    assert shifted[0] == 1.0 and shifted[-1] == 0.0
    assert shifted[1:4] == pytest.approx([0.9, 0.75, 0.5])


def test_every_step_is_told():
    told = []
    solve(gaussian_velocity, torch.zeros(2), SolverOptions(7, "heun", 1, 1), lambda: told.append(1))
    assert len(told) == 7


def test_guidance_goes_on_beyond_the_conditional_velocity():
    conditional, unconditional = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(
        guided(conditional, unconditional, 3.0), conditional + 2 * (conditional - unconditional)
    )


def test_noise_is_a_function_of_seed_and_index():
    assert torch.equal(noise_of_image(3, 7, 4, 2), noise_of_image(3, 7, 4, 2))
    draws = {
        noise_of_image(*key, 1, 1).item() for key in [(0, 0), (0, 1), (1, 0), (1, 11), (11, 1)]
    }
    assert len(draws) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((0, "euler", 1.0, 1.0), "steps: must be at least 1, got 0"),
        ((5, "euler", 0.0, 1.0), "shift: must be positive, got 0.0"),
        ((5, "euler", 1.0, -1.0), "guidance: must be zero or positive, got -1.0"),
        ((5, "euler", 1.0, float("nan")), "guidance: must be zero or positive, got nan"),
        ((5, "midpoint", 1.0, 1.0), "sampler = 'midpoint': nothing is registered"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SolverOptions(*settings)
