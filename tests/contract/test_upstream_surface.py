"""What this project overrides, calls, imports or otherwise relies on in torchtitan, with the parameters it counts on.

A move to another torchtitan release starts here: what fails is what has changed.
"""

import ast
import dataclasses
import inspect
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from symbiotic_titan import device
from symbiotic_titan.codecs.flux import autoencoder_module

PACKAGE = Path(device.__file__).parent

# Dotted name below torchtitan -> its parameters, in order.
SIGNATURES = {
    # train.py: the trainer that SymbioticTrainer extends
    "train.Trainer.__init__": ("self", "job_config"),
    "train.Trainer.init_distributed": ("self",),
    "train.Trainer.batch_generator": ("self", "data_iterable"),
    "train.Trainer.forward_backward_step": ("self", "input_dict", "labels", "global_valid_tokens"),
    "train.Trainer.train_step": ("self", "data_iterator"),
    "train.Trainer.train": ("self",),
    "train.Trainer.should_continue_training": ("self",),
    "train.Trainer.state_dict": ("self",),
    "train.Trainer.load_state_dict": ("self", "state_dict"),
    "train.Trainer.close": ("self",),
    # checkpoints
    "components.checkpoint.CheckpointManager.__init__": (
        "self",
        "dataloader",
        "model_parts",
        "optimizers",
        "lr_schedulers",
        "states",
        "checkpoint_config",
        "sd_adapter",
        "base_folder",
        "ft_manager",
    ),
    "components.checkpoint.CheckpointManager.save": ("self", "curr_step", "last_step"),
    "components.checkpoint.CheckpointManager.load": ("self", "step"),
    "components.checkpoint.CheckpointManager.dcp_save": (
        "self",
        "state_dict",
        "checkpoint_id",
        "async_mode",
        "enable_garbage_collection",
        "to_hf",
    ),
    "components.checkpoint.CheckpointManager._states_to_load": ("self", "model_only"),
    "components.checkpoint.CheckpointManager.maybe_wait_for_staging": ("self",),
    "components.checkpoint.CheckpointManager._async_wait": ("self",),
    "components.checkpoint.CheckpointManager._should_save": ("self", "curr_step", "last_step"),
    "components.checkpoint.CheckpointManager._purge_stale_checkpoints": ("self",),
    "components.checkpoint.CheckpointManager.close": ("self",),
    # metrics
    "components.metrics.MetricsProcessor.__init__": ("self", "job_config", "parallel_dims", "tag"),
    "components.metrics.MetricsProcessor.should_log": ("self", "step"),
    "components.metrics.MetricsProcessor.log": (
        "self",
        "step",
        "global_avg_loss",
        "global_max_loss",
        "grad_norm",
        "extra_metrics",
    ),
    "components.metrics.MetricsProcessor.close": ("self",),
    "components.metrics.BaseLogger.log": ("self", "metrics", "step"),
    "components.metrics.LoggerContainer.log": ("self", "metrics", "step"),
    "components.metrics.TensorBoardLogger.log": ("self", "metrics", "step"),
    "components.metrics.WandBLogger.log": ("self", "metrics", "step"),
    # validation; build_validator is the contract of the train spec's slot
    "components.validate.BaseValidator.__init__": ("self", "job_config"),
    "components.validate.BaseValidator.validate": ("self", "model_parts", "step"),
    "components.validate.BaseValidator.should_validate": ("self", "step"),
    "components.validate.build_validator": (
        "job_config",
        "dp_world_size",
        "dp_rank",
        "tokenizer",
        "parallel_dims",
        "loss_fn",
        "validation_context",
        "maybe_enable_amp",
        "metrics_processor",
        "pp_schedule",
        "pp_has_first_stage",
        "pp_has_last_stage",
    ),
    # optimizer and schedule
    "components.optimizer.OptimizersContainer.__init__": (
        "self",
        "model_parts",
        "optimizer_cls",
        "optimizer_kwargs",
    ),
    "components.optimizer.OptimizersContainer._post_init": (
        "self",
        "all_params",
        "optimizer_kwargs",
    ),
    "components.optimizer.OptimizersContainer.load_state_dict": ("self", "state_dict"),
    "components.lr_scheduler.LRSchedulersContainer.__init__": ("self", "optimizers", "lr_lambda"),
    "components.lr_scheduler.LRSchedulersContainer.state_dict": ("self",),
    "components.lr_scheduler.LRSchedulersContainer.load_state_dict": ("self", "state_dict"),
    "components.lr_scheduler.build_lr_schedulers": (
        "optimizers",
        "lr_scheduler_config",
        "training_steps",
    ),
    # config
    "config.ConfigManager.__init__": ("self", "config_cls"),
    "config.ConfigManager.parse_args": ("self", "args"),
    "config.ConfigManager._maybe_load_toml": ("self", "args"),
    "config.ConfigManager._dict_to_dataclass": ("self", "cls", "data"),
    # distributed
    "distributed.ParallelDims.__init__": (
        "self",
        "dp_replicate",
        "dp_shard",
        "cp",
        "tp",
        "pp",
        "ep",
        "etp",
        "world_size",
        "_meshes",
        "_world_mesh",
    ),
    "distributed.ParallelDims.get_mesh": ("self", "dims"),
    "distributed.utils.clip_grad_norm_": (
        "parameters",
        "max_norm",
        "norm_type",
        "error_if_nonfinite",
        "foreach",
        "pp_mesh",
        "ep_enabled",
    ),
    "distributed.utils.dist_sum": ("x", "mesh", "extra_pg"),
    "distributed.utils.set_pg_timeouts": ("timeout", "parallel_dims"),
    "distributed.activation_checkpoint.apply_ac": (
        "model",
        "ac_config",
        "model_compile_enabled",
        "op_sac_save_list",
        "base_folder",
    ),
    # protocols
    "protocols.train_spec.TrainSpec.__init__": (
        "self",
        "model_cls",
        "model_args",
        "parallelize_fn",
        "pipelining_fn",
        "build_optimizers_fn",
        "build_lr_schedulers_fn",
        "build_dataloader_fn",
        "build_tokenizer_fn",
        "build_loss_fn",
        "build_validator_fn",
        "build_metrics_processor_fn",
        "state_dict_adapter",
    ),
    "protocols.train_spec.get_train_spec": ("name",),
    "protocols.train_spec.register_train_spec": ("name", "train_spec"),
    "protocols.model_converter.ModelConverter.convert": ("self", "model"),
    "protocols.model_converter.ModelConverter.post_optimizer_hook": ("self", "model"),
    "protocols.model_converter.build_model_converters": ("job_config", "parallel_dims"),
    "protocols.model_converter.register_model_converter": ("converter_cls", "name"),
    "protocols.model.BaseModelArgs.__init__": ("self", "_enforced"),
    "protocols.model.BaseModelArgs.update_from_config": ("self", "job_config", "kwargs"),
    "protocols.model.BaseModelArgs.get_nparams_and_flops": ("self", "model", "seq_len"),
    "protocols.model.ModelProtocol.__init__": ("self", "model_args"),
    "protocols.model.ModelProtocol.init_weights": ("self", "buffer_device"),
    # tools that the device seam replaces
    "tools.utils.get_device_info": (),
    "tools.utils.get_peak_flops": ("device_name",),
    "tools.logging.init_logger": (),
    "tools.profiling.maybe_enable_profiling": (
        "profiling_config",
        "global_step",
        "base_folder",
        "leaf_folder",
    ),
}

# Names that are imported as types, values or exceptions: they only have to exist.
NAMES = {
    "components.checkpoint.AsyncMode",
    "components.checkpoint.DATALOADER",
    "components.checkpoint.LR_SCHEDULER",
    "components.checkpoint.MODEL",
    "components.checkpoint.OPTIMIZER",
    "tools.utils.GarbageCollection",
    "tools.utils.NoColor",
    "components.dataloader.BaseDataLoader",
    "components.tokenizer.BaseTokenizer",
    "train.CheckpointManager",
    "config.TORCH_DTYPE_MAP",
    "protocols.model_converter._registry_model_converter_cls",
    "tools.logging.logger",
    "tools.utils.device_module",
    "tools.utils.device_type",
    "tools.utils.set_default_dtype",
    "distributed.parallel_dims.device_type",
}

# Config classes that are extended or passed on -> fields that are read or set here.
CONFIG_FIELDS = {
    "JobConfig": {"job", "model", "optimizer", "lr_scheduler", "training", "parallelism"}
    | {"checkpoint", "activation_checkpoint", "metrics", "experimental", "debug", "comm"},
    "Model": {"name", "flavor", "hf_assets_path", "converters"},
    "Quantize": {"linear", "grouped_mm"},
    "FaultTolerance": {"enable"},
    "MemoryEstimation": {"enable"},
    "Optimizer": {"name", "lr", "beta1", "beta2", "eps", "weight_decay", "implementation"},
    "LRScheduler": {"warmup_steps", "total_steps", "decay_ratio", "decay_type", "min_lr_factor"},
    "ActivationCheckpoint": {"mode", "selective_ac_option"},
    "Parallelism": {"data_parallel_replicate_degree", "data_parallel_shard_degree"}
    | {"expert_parallel_degree", "fsdp_reshard_after_forward"},
    "Training": {"dtype", "mixed_precision_param", "mixed_precision_reduce", "enable_cpu_offload"}
    | {"local_batch_size", "global_batch_size", "seq_len"},
    "Validation": {"enable", "freq", "steps", "dataset", "dataset_path", "local_batch_size"}
    | {"seq_len", "dataloader"},
    "DataLoader": {"num_workers", "pin_memory", "prefetch_factor", "persistent_workers"},
    "Checkpoint": {"enable", "folder", "interval", "load_step", "last_save_model_only"}
    | {"initial_load_path", "initial_load_model_only", "exclude_from_loading"},
    "Metrics": {"log_freq"},
}

# The same for torchao, which is imported only where a model is converted to float8.
TORCHAO = {
    "float8.Float8LinearConfig.from_recipe_name": ("recipe_name",),
    "float8.convert_to_float8_training": ("module", "module_filter_fn", "config"),
    "float8.precompute_float8_dynamic_scale_for_fsdp": ("module",),
    "prototype.moe_training._to_fp8_rowwise_then_scaled_grouped_mm": (
        "A",
        "B_t",
        "offs",
        "out_dtype",
        "float8_dtype",
        "pad_token_groups_for_grouped_mm",
    ),
}


def upstream(dotted: str, package: str = "torchtitan") -> Any:
    """The object that ``<package>.<dotted>`` names: attributes of the longest prefix that is a module."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join([package, *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AttributeError(dotted)


def imported_from_torchtitan() -> dict[str, str]:
    """Dotted name below torchtitan -> the file of ours that imports it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("torchtitan"):
                module = str(node.module).removeprefix("torchtitan").lstrip(".")
                found |= {f"{module}.{alias.name}": path.name for alias in node.names}
    return found


def test_torchtitan_is_the_release_this_table_was_written_for():
    assert version("torchtitan") == "0.2.2"


@pytest.mark.parametrize("dotted", sorted(SIGNATURES))
def test_signature_is_the_expected_one(dotted):
    assert tuple(inspect.signature(upstream(dotted)).parameters) == SIGNATURES[dotted]


@pytest.mark.parametrize("dotted", sorted(TORCHAO))
def test_signature_of_torchao_is_the_expected_one(dotted):
    found = upstream(dotted, package="torchao")
    assert tuple(inspect.signature(found).parameters) == TORCHAO[dotted]


@pytest.mark.parametrize("dotted", sorted(NAMES))
def test_name_exists(dotted):
    assert upstream(dotted) is not None


@pytest.mark.parametrize("name", sorted(CONFIG_FIELDS))
def test_config_class_has_the_fields(name):
    fields = {field.name for field in dataclasses.fields(upstream(f"config.job_config.{name}"))}
    assert not CONFIG_FIELDS[name] - fields


def test_the_autoencoder_that_is_loaded_from_its_file_has_what_the_codec_sets():
    module = autoencoder_module()
    fields = inspect.signature(module.AutoEncoderParams).parameters
    assert {"ch", "ch_mult", "num_res_blocks", "z_channels"} <= set(fields)
    assert fields["scale_factor"].default == 0.3611 and fields["shift_factor"].default == 0.1159
    assert list(inspect.signature(module.AutoEncoder).parameters) == ["params"]


def test_everything_imported_from_torchtitan_is_in_a_table():
    listed = [*SIGNATURES, *NAMES]
    config_classes = {
        f"{place}.{name}" for name in CONFIG_FIELDS for place in ("config", "config.job_config")
    }
    unlisted = {
        dotted: file
        for dotted, file in imported_from_torchtitan().items()
        if dotted not in config_classes
        and not inspect.ismodule(upstream(dotted))
        and not any(entry == dotted or entry.startswith(dotted + ".") for entry in listed)
    }
    assert not unlisted
