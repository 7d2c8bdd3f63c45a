"""The table of parity has all architectures, and what it says is within the bar."""

import json

from tests.helpers import parity_table


def test_every_architecture_is_within_1e_5_of_transformers(monkeypatch, capsys):
    monkeypatch.setattr(parity_table, "SEEDS", range(1))
    parity_table.main()
    worst = json.loads(capsys.readouterr().out.splitlines()[-1])["worst"]
    sizes = {"aria at 490 pixels", "aria at 980 pixels"}
    names = {"qwen3_vl_moe", "qwen3_omni_moe_thinker", "glm4v_moe", "ernie4_5_vl_moe"}
    names |= {"aria", "hunyuan_v1_moe"}
    assert set(worst) == names | sizes
    for model_type, values in worst.items():
        assert ("image_gap" in values) == (model_type != "hunyuan_v1_moe")
        assert all(value < 1e-5 for key, value in values.items() if key.endswith("_gap"))
        assert all(value > 1 for key, value in values.items() if key.endswith("_logit"))
        assert all(value == 1 for key, value in values.items() if key.endswith("_choices"))
