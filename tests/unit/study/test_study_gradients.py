"""Gradients of the shared expert by modality, against sums token by token, and of a run's checkpoint."""

import tarfile
from pathlib import Path

import pytest
import torch

from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.config.saved import saved_config
from symbiotic_titan.sequence.modality import MODALITY_NAMES, PADDING, TEXT, VAE, VIT
from symbiotic_titan.study.gradients import (
    gradient_numbers,
    mean_parts,
    part_of,
    shared_experts,
    shared_gradients,
    shielding_all_but,
)
from tests.helpers.tiny_models import MIXED, pack_row, run_model, tiny_args, tiny_model

FIXTURE = Path(__file__).parents[2] / "fixtures" / "run_d603279"


@pytest.fixture(scope="module")
def model_and_batch():
    """Two MoE layers with gated shared experts, shielded as in training, and a batch with padding."""
    args = tiny_args(num_dense_layers=0, shared_gate=True, shield_modalities=(VAE,))
    return tiny_model(args).eval(), pack_row(MIXED, args)


def loss_of(output, batch):
    """Of everything that the model returns for tokens, not for padding; the routing as well."""
    balance = sum(p.square().sum() for record in output.records for p in record.prob_sum)
    logits, velocity = output.logits[batch.document >= 0], output.velocity[batch.vae_image >= 0]
    return logits.square().mean() + velocity.square().mean() + 1e-3 * balance


def token_by_token(expert, x_TD, grad_TD, tokens):
    """The gradient of all weights: each token's own, from the gradient of its output, through autograd alone."""
    total = torch.zeros(sum(p.numel() for p in expert.parameters()))
    for t in tokens:
        out_1D = expert(x_TD[t : t + 1].detach(), torch.tensor([TEXT]), torch.tensor(1.0))
        found = torch.autograd.grad(out_1D, list(expert.parameters()), grad_TD[t : t + 1])
        total += torch.cat([gradient.flatten() for gradient in found])
    return total


def test_parts_are_those_of_each_modality_s_tokens_and_sum_to_the_whole(model_and_batch):
    model, batch = model_and_batch
    experts = shared_experts(model)
    assert list(experts) == [0, 1]
    seen, handles = {}, []

    def keep(layer, inputs, output):
        output.retain_grad()
        seen[layer] = (inputs[0], inputs[1], output)

    for layer, expert in experts.items():
        hook = expert.register_forward_hook(lambda _, i, o, layer=layer: keep(layer, i, o))
        handles.append(hook)
    model.zero_grad()
    loss_of(run_model(model, batch), batch).backward()
    for handle in handles:
        handle.remove()
    whole = {n: torch.cat([p.grad.flatten() for p in e.parameters()]) for n, e in experts.items()}

    def loss(scale):
        return loss_of(run_model(model, batch, shield_scale=scale), batch)

    parts = {m: part_of(model, m, loss) for m in (TEXT, VIT, VAE, PADDING)}
    for layer, expert in experts.items():
        x_TD, modality_T, out_TD = seen[layer]
        for m in (TEXT, VIT, VAE):
            tokens = (modality_T == m).nonzero().flatten().tolist()
            expected = token_by_token(expert, x_TD, out_TD.grad, tokens)
            assert expected.norm() > 0
            torch.testing.assert_close(parts[m][layer], expected, rtol=1e-4, atol=1e-6)
        assert not parts[PADDING][layer].any()
        total = parts[TEXT][layer] + parts[VIT][layer] + parts[VAE][layer]
        torch.testing.assert_close(total, whole[layer], rtol=1e-4, atol=1e-6)
        assert expert.shield_modalities == (VAE,) and expert.shield_mode == "output"


def test_the_shield_is_back_after_an_error(model_and_batch):
    model, _ = model_and_batch
    experts = shared_experts(model)
    with pytest.raises(KeyError), shielding_all_but(experts, TEXT):
        assert experts[0].shield_modalities == (VIT, VAE, PADDING)
        raise KeyError
    assert experts[0].shield_modalities == (VAE,)


def test_numbers_are_norms_and_the_cosine_of_the_two_sides():
    parts = {
        "text": {1: torch.tensor([3.0, 0.0]), 2: torch.tensor([0.0, 0.0])},
        "vit": {1: torch.tensor([0.0, 4.0]), 2: torch.tensor([0.0, 1.0])},
        "vae": {1: torch.tensor([-6.0, -8.0]), 2: torch.tensor([2.0, 0.0])},
    }
    found = gradient_numbers(parts)
    assert found["norm/text"] == 3 and found["norm/vit"] == pytest.approx(17**0.5)
    assert found["norm/generation"] == found["norm/vae"] == pytest.approx(104**0.5)
    assert found["norm/understanding/layer_01"] == 5
    assert found["cosine/layer_01"] == pytest.approx(-1) and found["cosine/layer_02"] == 0
    assert found["cosine"] == pytest.approx(-50 / (26 * 104) ** 0.5)
    assert len(found) == 3 * (5 + 1)
    alone = gradient_numbers({"text": parts["text"]})
    assert set(alone) >= {"norm/text", "norm/understanding/layer_02"}
    assert not [name for name in alone if "cosine" in name or "generation" in name]


def test_a_modality_that_a_batch_lacks_adds_nothing_to_the_mean():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    mean = mean_parts([{"text": {4: one}}, {"text": {4: two}, "vae": {4: two}}])
    assert {name: part[4].tolist() for name, part in mean.items()} == {
        "text": [2.0, 4.0],
        "vae": [1.5, 3.0],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three steps, with held-out data: those that it trained on."""
    folder = tmp_path_factory.mktemp("run")
    text = (FIXTURE / "config.toml").read_text().replace("tests/fixtures", str(FIXTURE.parent))
    source = {"name": "t2i", "task": "t2i", "format": "webdataset"}
    source |= {"path": f"{FIXTURE}/data/t2i.tar", "weight": 1}
    mmu = source | {"name": "mmu", "task": "mmu", "path": f"{FIXTURE}/data/mmu.tar"}
    rows = "".join(
        "\n[[validation.sources]]\n" + "".join(f"{k} = {v!r}\n" for k, v in row.items())
        for row in (source, mmu)
    )
    before = "freq = 100\nsteps = 4\nsources = []\n"
    assert before in text
    (folder / "config.toml").write_text(
        text.replace(before, before.replace("sources = []\n", rows))
    )
    with tarfile.open(FIXTURE / "checkpoint.tar.xz") as archive:
        archive.extractall(
            folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
        )
    return folder


def test_those_of_a_run_are_of_its_checkpoint_and_its_held_out_data(run):
    found = shared_gradients(run, 3, num_batches=2)
    assert found == shared_gradients(run, num_batches=2)  # its newest step, bit for bit
    for name in (*MODALITY_NAMES, "generation", "understanding"):
        whole, by_layer = (
            found[f"norm/{name}"],
            [value for tag, value in found.items() if tag.startswith(f"norm/{name}/layer_")],
        )
        assert by_layer and (whole > 0 or name == "vit")  # the last layer: nothing reads its images
        assert whole == pytest.approx(sum(value**2 for value in by_layer) ** 0.5)
    assert -1 <= found["cosine"] <= 1


def test_what_cannot_be_measured_is_told_in_one_line(run, tmp_path):
    with pytest.raises(ValueError, match=r"has no checkpoint of step 7; leave the step out for"):
        shared_gradients(run, 7)
    (tmp_path / "config.toml").write_text((FIXTURE / "config.toml").read_text())
    with pytest.raises(ValueError, match=r"no \[\[validation.sources\]\], whose data are read"):
        shared_gradients(tmp_path)
    assert load_job_config(["--job.config_file", str(saved_config(run))]).validation.sources
