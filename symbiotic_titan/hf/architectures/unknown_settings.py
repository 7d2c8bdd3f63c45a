"""Settings of a config.json that no table of an architecture lists: notes are ignored, the others are refused, all in one message.

A note cannot change what the network computes: names of tools and of files, versions, ids of tokens, options of training and
generation. Everything else may, so it is not ignored.
"""

import re
from collections.abc import Callable, Container, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

Args = TypeVar("Args")

_NOTES = {
    # ids of tokens
    *("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "sep_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    # what the files are, and the code that reads them
    *("model_type", "architectures", "transformers_version", "auto_map", "tokenizer_class"),
    *("processor_class", "name_or_path", "model_name", "base_model", "license", "language"),
    *("finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "prefix"),
    *("is_encoder_decoder", "is_decoder", "pruned_heads", "max_position_embeddings"),
    # how it is run: dtypes, kernels, what is returned
    *("dtype", "torch_dtype", "use_bfloat16", "attn_implementation", "use_flash_attention"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("output_scores", "return_dict", "return_dict_in_generate", "chunk_size_feed_forward"),
    *("torchscript", "tf_legacy_loss", "gradient_checkpointing"),
    # training
    *("initializer_range", "router_aux_loss_coef"),
    # generation
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p"),
    *("repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "remove_invalid_values"),
    "exponential_decay_length_penalty",
}
# Of a private attribute, or of a tool that names itself: unsloth_fixed, transformers.js_config.
_OF_A_TOOL = re.compile(
    r"_|(?:unsloth|ms_swift|swift|axolotl|llamafactory|llama_factory|transformers[._]js|peft|trl)(?:_|$)"
)
_VERSION = re.compile(r"v?\d+(?:\.\w+)+(?:[-+].*)?")
_LONGEST_VALUE = 60

# Where refused settings are collected; None: each table refuses its own.
_refused: ContextVar[list[str] | None] = ContextVar("refused settings", default=None)


def refused_together(read: Callable[..., Args]) -> Callable[..., Args]:
    """``read``, so that unknown settings of all tables that it checks are refused at its end, in one message."""

    @wraps(read)
    def reading(*arguments: Any, **options: Any) -> Args:
        found: list[str] = []
        token = _refused.set(found)
        try:
            result = read(*arguments, **options)
        finally:
            _refused.reset(token)
        if found:
            raise ValueError(_message(found))
        return result

    return reading


def check_known(values: Mapping[str, Any], prefix: str, known: Container[str]) -> None:
    """Pass if every setting of a table is ``known``, a note, or off. ``prefix``: before their names in messages.

    Raises:
        ValueError: names those that are not; inside ``refused_together``, at its end.
    """
    found = [
        f"{prefix}{key} = {_shortened(value)}"
        for key, value in values.items()
        if value and key not in known and not _is_note(key, value)
    ]
    collected = _refused.get()
    if collected is not None:
        collected += found
    elif found:
        raise ValueError(_message(found))


def _is_note(key: str, value: Any) -> bool:
    if key in _NOTES or _OF_A_TOOL.match(key):
        return True
    return key.endswith("version") and isinstance(value, str) and bool(_VERSION.fullmatch(value))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}.."


def _message(found: list[str]) -> str:
    if len(found) == 1:
        return (
            f"config.json: {found[0]} is not a setting that this network is known to support; remove it from the file if it does not "
            "change what is computed"
        )
    return (
        f"config.json: {', '.join(found)} are not settings that this network is known to support; remove from the file those that do "
        "not change what is computed"
    )
