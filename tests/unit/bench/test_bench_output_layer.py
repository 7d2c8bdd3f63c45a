"""The benchmark of the output layer compares equal work, measures the memory that it says, and prints one JSON line."""

import json
import sys

import pytest
import torch

from tools.bench import output_layer

SIZES = ["--vocab", "37", "--dim", "8", "--length", "64", "--dtype", "float32", "--repeats", "2"]


def test_contenders_give_the_same_loss_and_gradients():
    runs, parameters = output_layer.contenders(37, 8, 64, 0.45, torch.float32)
    results = [(run(), *(p.grad.clone() for p in parameters)) for run in runs.values()]
    assert len(results) == 3 and results[0][0] > 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_the_peak_is_that_of_the_tensors_in_use():
    def run():
        first = torch.ones(1 << 18)  # 1 MiB
        second = torch.ones(1 << 18) + first
        del first
        return second * 2

    assert output_layer.peak_mib(run) == 3.0


def test_it_prints_one_line_of_json_with_finite_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["output_layer.py", *SIZES])
    output_layer.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["37_float32"]
    assert set(result["milliseconds"]) == {"all_plain", "all", "labelled"}
    assert all(row["median_ms"] > 0 for row in result["milliseconds"].values())
    assert result["speedup"]["labelled"] > 0
    # All tokens' logits and their gradient in float32; those of labelled tokens are fewer.
    assert result["peak_mib"]["all_plain"] >= result["peak_mib"]["labelled"]


@pytest.mark.parametrize("share", ["0", "1"])
def test_no_label_and_labels_everywhere_can_be_measured(share, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["output_layer.py", *SIZES, "--share", share])
    output_layer.main()
    assert '"speedup"' in capsys.readouterr().out
