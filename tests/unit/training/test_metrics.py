"""Which steps are logged, and what a step leaves in TensorBoard."""

import logging
import re
import resource
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray
from torchtitan.components.metrics import BaseLogger, WandBLogger
from torchtitan.distributed import ParallelDims

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.load import load_job_config
from symbiotic_titan.moe.partition import ExpertGroup
from symbiotic_titan.moe.record import LoggedRouting, RoutingTotals
from symbiotic_titan.sequence.modality import TEXT, VAE, VIT
from symbiotic_titan.training.metrics import (
    StepReport,
    SymbioticMetrics,
    TolerantSink,
)

GROUPS = (ExpertGroup("und", (TEXT, VIT), 4), ExpertGroup("gen", (VAE,), 2))
COUNTS = torch.tensor([[[4, 4, 2, 2, 0, 0], [0] * 6, [0, 0, 0, 0, 6, 2]]]).repeat(2, 1, 1)
# Those of the last steps: one generation expert has more of them, and ViT had tokens.
RECENT = COUNTS + torch.tensor([[[0] * 6, [2, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 8]]])


class NoCost:
    """Stands in for the model's cost."""

    def training_flops_per_token(self, shares, labelled):
        return 1.0

    def visible_training_flops(self, tokens, labelled, pairs):
        return 1.0


@pytest.fixture
def make_metrics(tmp_path, monkeypatch):
    """Metrics of a run of 40 steps of a model whose layers 1 and 2 have experts; options as on the command line."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)

    def make(*options):
        config: JobConfig = load_job_config(
            ["--job.dump_folder", str(tmp_path), "--training.steps", "40", *options]
        )
        one_rank = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "etp"), 1)
        dims = ParallelDims(**one_rank, world_size=1)
        metrics = SymbioticMetrics(config, dims, GROUPS, moe_layers=range(1, 3))
        metrics.cost = NoCost()
        return metrics

    return make


def report(step):
    return StepReport(
        step=step,
        losses={"text": 1.0, "flow": 2.0, "balance": 3.0},
        grad_norms={"all": 1.0},
        update_ratios={},
        ema={},
        rates={},
        weights={"mine": 2.0},
        routing=LoggedRouting(RoutingTotals(COUNTS, torch.zeros(2, 2, dtype=torch.int64)), RECENT),
        shield_scale=1.0,
        fill=1.0,
        skipped={"skipped": 0},
        tokens_seen=torch.tensor([1, 0, 1]),
    )


def read_log(folder):
    (file,) = folder.glob("tb/*/events.out.*")
    return EventAccumulator(str(file)).Reload()


def logged_steps(metrics):
    return [step for step in range(1, 41) if metrics.should_log(step)]


def test_an_account_of_routing_makes_its_step_a_logged_one(make_metrics):
    metrics = make_metrics("--metrics.log_freq", "20", "--metrics.routing_freq", "15")
    assert logged_steps(metrics) == [1, 15, 20, 30, 40]
    assert [s for s in range(1, 41) if metrics.shows_routing(s)] == [1, 15, 30, 40]


def test_without_accounts_of_routing_only_the_usual_steps_are_logged(make_metrics):
    metrics = make_metrics("--metrics.log_freq", "20", "--metrics.routing_freq", "0")
    assert logged_steps(metrics) == [1, 20, 40]
    assert not any(metrics.shows_routing(step) for step in range(1, 41))


def test_negative_distance_of_accounts_is_refused(make_metrics):
    with pytest.raises(ValueError, match="metrics.routing_freq: must be zero or positive, got -1"):
        make_metrics("--metrics.routing_freq", "-1")


def test_means_are_logged_always_and_layers_with_an_account(make_metrics, tmp_path):
    metrics = make_metrics("--metrics.enable_tensorboard", "--metrics.routing_freq", "15")
    for step in (1, 10, 15):
        metrics.log_step(report(step))
    metrics.close()
    log = read_log(tmp_path)
    assert [e.step for e in log.Scalars("routing/capacity_rate/vae")] == [1, 10, 15]
    assert [e.value for e in log.Scalars("data/weight/mine")] == [2.0, 2.0, 2.0]
    by_layer = log.Scalars("routing_by_layer/capacity_rate/vae/layer_02")
    # Of the recent counts 6 and 10, of which 8 each fit, and over all 6 experts 3 each; the imbalance is that of 6 and 2.
    assert [(e.step, e.value) for e in by_layer] == [(1, 0.875), (15, 0.875)]
    assert log.Scalars("routing/capacity_rate_global/vae")[0].value == pytest.approx(6 / 16)
    assert log.Scalars("routing/imbalance/vae")[0].value == 1.5
    assert "routing/capacity_rate/vit" in log.Tags()["scalars"]
    assert "routing/imbalance/vit" not in log.Tags()["scalars"]
    assert log.Tags()["images"] == ["routing/experts/text", "routing/experts/vae"]
    assert [e.step for e in log.Images("routing/experts/vae")] == [1, 15]
    tensors = log.Tensors("routing/counts")
    assert [e.step for e in tensors] == [1, 15]
    counts = make_ndarray(tensors[1].tensor_proto)
    assert counts.dtype == "int32" and (counts == COUNTS.numpy()).all()


def test_tensorboard_gets_the_config_hyperparameters_and_groups_of_curves_once(
    make_metrics, tmp_path
):
    metrics = make_metrics("--metrics.enable_tensorboard", "--optimizer.lr", "0.125")
    for step in (1, 2):
        metrics.log_step(report(step))
    metrics.close()
    log = read_log(tmp_path)
    [text] = log.Tensors("config/text_summary")
    lines = make_ndarray(text.tensor_proto).item().decode().splitlines()
    assert "    [optimizer]" in lines and "    lr = 0.125" in lines
    found = {
        tag: log.SummaryMetadata(tag).plugin_data.content
        for tag in ("_hparams_/experiment", "_hparams_/session_start_info")
    }
    start = HParamsPluginData.FromString(found["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["optimizer.lr"].number_value == 0.125
    assert start.hparams["model.flavor"].string_value == metrics.job_config.model.flavor
    experiment = HParamsPluginData.FromString(found["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} >= {"loss/text", "validation/text"}
    [layout] = log.Tensors("custom_scalars__config__")
    charts = Layout.FromString(make_ndarray(layout.tensor_proto).item())
    patterns = [tag for c in charts.category for chart in c.chart for tag in chart.multiline.tag]
    assert any(re.search(tag, "loss/text") for tag in patterns)
    assert {category.title for category in charts.category} >= {"losses", "routing"}


class FakeWandb:
    """The part of wandb's interface that logging uses."""

    def __init__(self):
        self.logged, self.run = [], None

    def Image(self, image_HW3):
        assert image_HW3.dtype == np.uint8 and image_HW3.shape[2] == 3
        return image_HW3.shape

    def log(self, values, step):
        self.logged.append((step, values))


def test_pictures_and_heat_maps_reach_wandb_where_it_is_the_only_one(make_metrics):
    metrics = make_metrics()
    assert not metrics.shows_images
    sink = WandBLogger.__new__(WandBLogger)
    sink.wandb, sink.tag = FakeWandb(), None
    metrics.sinks, metrics.logger = [TolerantSink(sink)], sink
    assert metrics.shows_images
    metrics.log_image("sampling/pictures", np.zeros((4, 5, 3), np.uint8), 0)
    metrics.log_step(report(1))
    logged = sink.wandb.logged
    assert logged[0] == (0, {"sampling/pictures": (4, 5, 3)})
    assert [next(iter(v)) for _, v in logged[1:3]] == [
        "routing/experts/text",
        "routing/experts/vae",
    ]
    assert [step for step, _ in logged] == sorted(step for step, _ in logged), "as wandb demands"
    assert logged[-1][1]["loss/text"] == 1.0


def test_without_matplotlib_heat_maps_are_missed_with_one_warning(
    make_metrics, monkeypatch, tmp_path
):
    for name in [n for n in sys.modules if n.startswith(("matplotlib", "symbiotic_titan.plots."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = []
    monkeypatch.setattr(logging.getLogger(), "warning", told.append)
    metrics = make_metrics("--metrics.enable_tensorboard", "--metrics.routing_freq", "1")
    for step in (1, 2):
        metrics.log_step(report(step))
    metrics.close()
    assert len(told) == 1 and "heat maps of routing need matplotlib" in told[0]
    log = read_log(tmp_path)
    assert len(log.Tensors("routing/counts")) == 2 and not log.Tags()["images"]


def test_a_full_disk_costs_metrics_but_not_the_training(make_metrics, tmp_path, monkeypatch):
    """One warning; the log goes on in another file once there is room. Another program's trouble is no trouble either."""
    monkeypatch.setattr("symbiotic_titan.training.metrics.RETRY_S", 0.0)
    told, unhandled = [], []
    monkeypatch.setattr(logging.getLogger(), "warning", told.append)
    monkeypatch.setattr("threading.excepthook", unhandled.append)
    metrics = make_metrics("--metrics.enable_tensorboard", "--metrics.routing_freq", "0")
    metrics.log_step(report(1))
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (10, hard)
    )  # to a file of more bytes nothing is added
    try:
        for step in (2, 3):
            metrics.log_step(report(step))
            metrics.write_tensorboard(lambda writer: writer.flush())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    metrics.sinks.append(TolerantSink(BrokenSink()))
    metrics.logger.add_logger(metrics.sinks[-1])
    for step in (4, 5):
        metrics.log_step(report(step))
    metrics.close()
    steps = set()
    for file in tmp_path.glob("tb/*/events.out.*"):
        log = EventAccumulator(str(file)).Reload()
        if "loss/text" in log.Tags()["scalars"]:
            steps |= {event.step for event in log.Scalars("loss/text")}
    assert steps >= {4, 5} and 3 not in steps
    first, second, *last = told
    assert "TensorBoard: metrics cannot be written (OSError: [Errno 27] File too large" in first
    assert (
        "BrokenSink: metrics cannot be written (RuntimeError: no network); training goes on"
        in second
    )
    assert len(last) == 2 and all("writes of metrics were lost" in line for line in last)
    assert not unhandled


class BrokenSink(BaseLogger):
    def log(self, metrics, step):
        raise RuntimeError("no network")


def test_without_tensorboard_other_loggers_get_the_scalars(make_metrics):
    class Sink(BaseLogger):
        def log(self, metrics, step):
            self.seen = metrics

    metrics = make_metrics()
    metrics.logger = sink = Sink()
    metrics.log_step(report(1))
    assert sink.seen["routing_by_layer/imbalance/text/layer_01"] == pytest.approx(4 / 3)


def test_utilisation_is_that_of_tokens_labels_and_pairs_since_the_last_log(make_metrics):
    """By visible pairs, and under its own name by whole rows."""

    class Cost:
        def training_flops_per_token(self, shares, labelled):
            asked.append((shares, labelled))
            return 3e9

        def visible_training_flops(self, tokens, labelled, pairs):
            asked.append((tokens, labelled, pairs))
            return 27e9

    class Sink(BaseLogger):
        def log(self, metrics, step):
            seen.append(metrics)

    metrics, asked, seen = make_metrics(), [], []
    metrics.cost, metrics.logger, metrics.gpu_peak_flops = Cost(), Sink(), 1e12
    for step, num_labels in ((1, 3), (2, 4), (3, 5)):
        pairs = torch.tensor([40.0, 4.0, 0.0], dtype=torch.float64)
        metrics.count(torch.tensor([7, 0, 2]), num_labels, pairs)
        if step != 1:
            metrics.log_step(report(step))
    assert asked == [
        ((14.0, 0.0, 4.0), 7.0, [80.0, 8.0, 0.0]), ((14.0, 0.0, 4.0), 7.0),
        ((7.0, 0.0, 2.0), 5.0, [40.0, 4.0, 0.0]), ((7.0, 0.0, 2.0), 5.0),
    ]  # fmt: skip
    assert metrics.ntokens_since_last_log == 0
    for found, tokens in zip(seen, (18, 9), strict=True):
        visible = found["perf/mfu"]
        assert found["perf/mfu_full_rows"] == pytest.approx(visible * 3 * tokens / 27)
        assert found["perf/tflops_per_device"] == pytest.approx(visible / 100)
    metrics.gpu_peak_flops = float("nan")
    metrics.log_step(report(4))
    assert not {"perf/mfu", "perf/mfu_full_rows"} & seen[-1].keys()


def test_the_console_leaves_out_what_a_step_does_not_have(make_metrics, monkeypatch):
    """A step without target images, and a model without experts: no zero or NaN stands for what there is not."""
    metrics, lines = make_metrics("--metrics.disable_color_printing"), []
    monkeypatch.setattr("symbiotic_titan.training.metrics.logger.info", lines.append)
    full = replace(report(1), losses={**report(1).losses, "by_task/lm_text": 1.0, "total": 3.0})
    without_flow = replace(full, losses={"text": 1.0, "balance": 3.0})
    dense = replace(full, losses={"text": 1.0, "flow": 2.0, "balance": 0.0}, routing=None)
    for one in (full, without_flow, dense):
        metrics.log_step(one)
    names = [re.findall(r"([\w/]+): ", line) for line in lines]
    ends = ["grad_norm", "memory", "tokens/s"]
    assert names == [
        ["step", "text", "flow", "balance", "capacity", *ends],
        ["step", "text", "balance", "capacity", *ends],
        ["step", "text", "flow", *ends],
    ]


def test_the_console_tells_the_time_left_and_has_no_colours_in_a_log(make_metrics, monkeypatch):
    metrics, lines, now = make_metrics(), [], [0.0]
    monkeypatch.setattr("symbiotic_titan.training.metrics.logger.info", lines.append)
    monkeypatch.setattr("symbiotic_titan.training.metrics.time.perf_counter", lambda: now[0])
    for step, seconds in ((1, 30.0), (10, 48.0), (20, 70.0), (40, 110.0)):
        now[0] = seconds
        metrics.log_step(report(step))
    # The first step is slow, and pauses of later ones come again. The last has nothing left.
    assert [line.partition("left: ")[2] for line in lines] == ["", "60 s", "42 s", ""]
    assert not any("\033" in line for line in lines)
    monkeypatch.setattr("symbiotic_titan.training.metrics.shows_colors", lambda: True)
    assert make_metrics().color.red == "\033[31m"
    assert make_metrics("--metrics.disable_color_printing").color.red == ""
