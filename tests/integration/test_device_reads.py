"""How often a step waits for the device."""

import json
from collections import Counter

from tests.helpers.launch import arguments_of, train

# These read sizes on a CPU, where the model leaves padding out; on a GPU shapes are static and the kernels are others.
OTHER_KERNELS = ("model/", "moe/", "sequence/")


def test_the_host_reads_the_device_once_a_step_and_a_few_times_more_to_log_it(tmp_path, demo):
    arguments = arguments_of(
        tmp_path,
        demo,
        {
            "training.steps": 4,
            "training.global_batch_size": 8,
            "training.local_batch_size": 4,
            "metrics.log_freq": 3,
            "metrics.routing_freq": 0,
            "checkpoint.enable": False,
            "experimental.custom_import": "tests.helpers.device_reads",
        },
    )
    run = train(tmp_path, arguments)
    assert run.status == 0, run.text
    first, second, logged, last = (
        Counter(place for place in step if not place.startswith(OTHER_KERNELS))
        for step in json.loads((tmp_path / "reads.json").read_text())
    )
    once = {"parallel/ranks.py on_host": 1}
    assert second == once
    report = {
        "optim/group_norms.py group_ratios": 1,
        "training/metrics.py routing": 1,
        "training/step_data.py count_skipped": 1,
    }
    assert logged == last == first == once | report
