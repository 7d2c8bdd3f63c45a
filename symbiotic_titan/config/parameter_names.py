"""Names of parameters, as rules and checkpoints know them."""

# Prefixes that activation checkpointing and torch.compile put into parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def clean_name(name: str) -> str:
    """The parameter's name as the plain model has it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
