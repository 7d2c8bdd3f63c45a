"""The path, the timestep distributions, and draws that do not depend on how a step is split."""

import pytest
import torch

from symbiotic_titan.config.losses import Flow
from symbiotic_titan.flow import noise
from symbiotic_titan.flow.noise import draw_noise_and_timesteps, first_token_of_image, row_generator
from symbiotic_titan.flow.path import (
    TIMESTEP_DISTRIBUTIONS,
    draw_timesteps,
    interpolate,
    shift_timesteps,
    velocity_target,
)


def test_path_runs_from_data_to_noise_with_the_target_as_its_derivative():
    data, end = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    t = torch.rand(2, 5)
    assert torch.equal(interpolate(data, end, torch.zeros(2, 5)), data)
    assert torch.equal(interpolate(data, end, torch.ones(2, 5)), end)
    step = 1e-3
    slope = (interpolate(data, end, t + step) - interpolate(data, end, t)) / step
    torch.testing.assert_close(slope, velocity_target(data, end), rtol=1e-2, atol=1e-3)


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(shift_timesteps(t, 1.0), t)
    shifted = shift_timesteps(t, 3.0)
    assert shifted.tolist() == [0.0, 0.75, 1.0]


def test_logit_normal_timesteps_follow_their_mean():
    generator = torch.Generator().manual_seed(0)
    t = draw_timesteps((20_000,), Flow(timesteps="logit_normal", mean=0.0), generator)
    low = draw_timesteps((20_000,), Flow(timesteps="logit_normal", mean=-2.0), generator)
    uniform = draw_timesteps((20_000,), Flow(timesteps="uniform"), generator)
    assert abs(t.mean() - 0.5) < 0.01 and t.std() < uniform.std()
    assert low.mean() < 0.2
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.std() - 12**-0.5) < 0.01


def test_a_distribution_of_your_own_is_chosen_by_name_and_shifted():
    with TIMESTEP_DISTRIBUTIONS.temporarily(
        middle=lambda shape, config, generator: torch.full(shape, 0.5)
    ):
        t = draw_timesteps((2, 3), Flow(timesteps="middle", shift=3.0), torch.Generator())
    assert torch.equal(t, torch.full((2, 3), 0.75))


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ([0.5, 0.5], "list"),
        (torch.zeros(3), r"torch.float32 of shape \(3,\)"),
        (torch.zeros(2, dtype=torch.int64), r"torch.int64 of shape \(2,\)"),
        (torch.tensor([-0.5, 2.0]), "values from -0.5 to 2"),
        (torch.tensor([0.5, torch.nan]), "values from nan to nan"),
    ],
)
def test_a_distribution_that_returns_no_timesteps_is_refused_by_name(returned, got):
    with (
        TIMESTEP_DISTRIBUTIONS.temporarily(mine=lambda shape, config, generator: returned),
        pytest.raises(ValueError, match=rf"flow.timesteps = 'mine': .* shape \(2,\) .*, got {got}"),
    ):
        draw_timesteps((2,), Flow(timesteps="mine"), torch.Generator())


def test_an_unknown_distribution_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="flow.timesteps = 'logitnormal'.*uniform, logit_normal"):
        draw_timesteps((1,), Flow(timesteps="logitnormal"), torch.Generator())


def test_tokens_of_one_image_share_a_timestep_and_images_differ():
    image = torch.tensor([[4, 4, 7, 7, 7, -1]])
    assert first_token_of_image(image).tolist() == [[0, 0, 2, 2, 2, 5]]
    _, t = draw_noise_and_timesteps(image, 3, config=Flow(), step=1, first_row=0)
    assert t[0, 0] == t[0, 1] and t[0, 2] == t[0, 3] == t[0, 4]
    assert t[0, 0] != t[0, 2] and t[0, 5] == 0.0


@pytest.mark.parametrize("own_generators", [False, True])
def test_draws_do_not_depend_on_how_rows_are_split_into_micro_batches(own_generators, monkeypatch):
    """With ``own_generators`` noise is drawn as on a GPU: by a generator of the device, seeded for each row."""
    image = torch.zeros(4, 6, dtype=torch.int64)
    on_cpu = draw_noise_and_timesteps(image, 2, config=Flow(), step=9, first_row=0)
    if own_generators:

        def of_device(device, generator):
            return torch.Generator(device).manual_seed(generator.initial_seed())

        monkeypatch.setattr(noise, "generator_on", of_device)
    whole = draw_noise_and_timesteps(image, 2, config=Flow(), step=9, first_row=0)
    halves = [
        draw_noise_and_timesteps(image[:2], 2, config=Flow(), step=9, first_row=row)
        for row in (0, 2)
    ]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([half[i] for half in halves]))
    # Timesteps are the CPU's in any case.
    assert torch.equal(whole[1], on_cpu[1])
    assert torch.equal(whole[0], on_cpu[0]) is not own_generators


def test_noise_is_drawn_by_the_generator_itself_on_a_cpu_and_by_one_of_the_device_elsewhere():
    drawn = row_generator(0, 1, 2)
    assert noise.generator_on(torch.device("cpu"), drawn) is drawn
    if torch.cuda.is_available():
        torch.rand(3, generator=drawn)
        own = noise.generator_on(torch.device("cuda"), drawn)
        assert own.device.type == "cuda" and own.initial_seed() == drawn.initial_seed()


def test_draws_change_with_seed_step_and_row():
    draws = {
        torch.randn(1, generator=row_generator(*key)).item()
        for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 11, 0), (0, 1, 10)]
    }
    assert len(draws) == 6
