"""What TensorBoard is told about a run once: its config as text, a few hyperparameters, and which curves stand together."""

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from symbiotic_titan.config.job import JobConfig
from symbiotic_titan.config.saved import config_text

# Tab CUSTOM SCALARS: category -> chart -> regular expressions of its tags.
CHARTS: dict[str, dict[str, list[str]]] = {
    "losses": {
        "text, training and held out": ["^loss/text$", "^validation/text$"],
        "flow, training and held out": ["^loss/flow$", "^validation/flow$"],
        "by task": ["^loss/by_task/"],
    },
    "routing": {
        "capacity rate within groups": ["^routing/capacity_rate/"],
        "busiest expert over the mean": ["^routing/imbalance/"],
        "experts without tokens": ["^routing/idle_experts/"],
    },
    "optimization": {
        "learning rates": ["^lr/"],
        "gradient norms": ["^grad_norm/"],
        "update ratios": ["^update_ratio/"],
    },
    "data": {"tokens": ["^tokens/"], "weights of sources": ["^data/weight/"]},
}
# Columns of the tab HPARAMS beside the hyperparameters: their last values.
RESULTS = ("loss/text", "loss/flow", "validation/text", "validation/flow")

Value = bool | int | float | str


def hyperparameters(config: JobConfig) -> dict[str, Value]:
    """Those by which runs are told apart most often, under the names that the config has."""
    sections = {
        "model": ("flavor",),
        "training": ("steps", "seq_len", "local_batch_size", "global_batch_size"),
        "optimizer": ("name", "lr"),
        "lr_scheduler": ("warmup_steps",),
        "shielding": ("steps", "after_scale"),
        "parallelism": ("data_parallel_shard_degree", "expert_parallel_degree"),
    }
    values: dict[str, Value] = {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section, keys in sections.items()
        for key in keys
    }
    if config.debug.seed is not None:
        values["debug.seed"] = config.debug.seed
    values["experts"] = ", ".join(
        f"{name}: {group.num_experts}" for name, group in config.experts.partition.items()
    )
    return values


def describe_run(writer: SummaryWriter, config: JobConfig) -> None:
    """Write the tabs TEXT, HPARAMS and CUSTOM SCALARS of a run."""
    # Indented by four spaces it is code in Markdown.
    text = "".join(f"    {line}\n" for line in config_text(config).splitlines())
    writer.add_text("config", text, 0)
    layout = {
        category: {title: ["Multiline", tags] for title, tags in charts.items()}
        for category, charts in CHARTS.items()
    }
    writer.add_custom_scalars(layout)
    # Not ``writer.add_hparams``, which begins a run of its own below this one and writes its results at once.
    experiment, start, _ = hparams(hyperparameters(config), dict.fromkeys(RESULTS, 0.0))
    file = writer._get_file_writer()
    file.add_summary(experiment)
    file.add_summary(start)
