"""What an author of parts gets wrong is told in one line, where the part is registered, imported or tried."""

import re

import pytest

from symbiotic_titan import extend
from symbiotic_titan.codecs.codec import Codec
from symbiotic_titan.config.experts import ROUTER_SCORES
from symbiotic_titan.config.extension import import_extension
from symbiotic_titan.config.generation import SOLVERS
from symbiotic_titan.data.formats.shard import FileFormat
from symbiotic_titan.evaluation.suite import SUITES, Suite
from symbiotic_titan.flow.solver import check_solver
from symbiotic_titan.moe.router import check_score

DECORATORS = [
    extend.register_partition_rule,
    extend.register_shield_schedule,
    extend.register_router_score,
    extend.register_format,
    extend.register_packing,
    extend.register_timestep_distribution,
    extend.register_solver,
    extend.register_lr_decay,
    extend.register_codec,
    extend.register_resize_rule,
    extend.register_tokenizer_kind,
    extend.register_optimizer_builder,
]


@pytest.mark.parametrize("decorator", DECORATORS, ids=lambda value: value.__name__)
def test_a_decorator_without_parentheses_or_with_another_kind_of_part_is_told(decorator):
    def part():
        """Would be taken for a name."""

    with pytest.raises(ValueError, match="a decorator needs it in parentheses, as in @register"):
        decorator(part)
    with pytest.raises(ValueError, match=r" = 'mine': must be a .*, got 5$"):
        decorator("mine")(5)


class WithoutIndex(FileFormat):
    """Reads nothing."""


class WithoutLoad(Codec):
    """Describes nothing."""


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: extend.register_format("mine")(WithoutIndex), "FileFormat with index, got <class"),
        (
            lambda: extend.register_format("mine")(len),
            "must be a subclass of symbiotic_titan.data.",
        ),
        (lambda: extend.register_codec("mine")(WithoutLoad), "Codec with describe, load, got <cla"),
        (
            lambda: extend.register_packing("mine")(WithoutIndex),
            "packing = 'mine': must be a function",
        ),
        (lambda: extend.register_architecture("mine", len), "must be a symbiotic_titan.hf.archit"),  # type: ignore[arg-type]
        (lambda: extend.register_token_family("mine", len), "must be a symbiotic_titan.config.to"),  # type: ignore[arg-type]
        (lambda: extend.register_task(len), "register_task takes a Task, got <built-in function"),  # type: ignore[arg-type]
        (
            lambda: extend.register_loss_term("mine", weight=1.0)(5),
            "losses.mine: must be a function, go",
        ),  # type: ignore[arg-type]
        (lambda: extend.register_loss_term(len, weight=1.0), "a term cannot have the name <built"),  # type: ignore[arg-type]
        (
            lambda: SUITES.register("mine", len),
            "--suite mine: must be a Suite of that name, got <b",
        ),  # type: ignore[arg-type]
        (
            lambda: SUITES.register("mine", Suite("yours", "", int, len)),  # type: ignore[arg-type]
            "--suite mine: must be a Suite of that name, got a suite named 'yours'",
        ),
    ],
)
def test_a_part_of_another_kind_is_told(register, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        register()


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("my_parts.py", "", "must be the name of a module, not of its file; write 'my_parts'"),
        ("a/my_parts.py", "", "must be the name of a module, not of its file; write 'a.my_parts'"),
        ("my_exit", "import sys; sys.exit(3)", "'my_exit': importing it ends the program, with st"),
    ],
)
def test_what_is_no_module_of_parts_is_told(tmp_path, monkeypatch, name, code, message):
    (tmp_path / f"{name.partition('/')[0]}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        import_extension(name)


def softmax(logits_TE, allowed_TE):
    scores_TE = logits_TE.masked_fill(~allowed_TE, float("-inf")).softmax(-1)
    return scores_TE, scores_TE


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda x, allowed: softmax(x, allowed)[0],
            "must return two tensors, scores and pro",
        ),
        (
            lambda x, allowed: (x[:, :2], x),
            "scores must be float32 of the logits' shape, got torch.flo",
        ),
        (lambda x, allowed: (x.double(), x), "got torch.float64 of shape (3, 4) for (3, 4)"),
        (lambda x, allowed: (x / 0 * 0, x), "scores must be finite, also those of experts outside"),
        (lambda x, allowed: (x, x), "scores must be positive inside the token's group"),
        (lambda x, allowed: (x.exp(), x), "scores must be 0 outside the token's group"),
        (lambda x, allowed: (softmax(x, allowed)[0], x), "probabilities must lie in [0, 1]"),
        (lambda x, allowed: (softmax(x, allowed)[0], allowed * 0.1), "probabilities must sum to 1"),
        (lambda x, allowed: softmax(x.detach(), allowed), "scores must be differentiable by the l"),
    ],
)
def test_a_router_score_that_breaks_its_contract_is_named_before_training(score, message):
    with ROUTER_SCORES.temporarily(mine=score):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            check_score("mine")
        assert str(error.value).startswith("experts.score_function = 'mine': ")
    check_score("softmax")
    check_score("sigmoid")


@pytest.mark.parametrize(
    ("step", "got"),
    [
        (lambda velocity, x, t, t_next: None, "got None"),
        (lambda velocity, x, t, t_next: x[:1], "got shape (1, 3, 4)"),
        (lambda velocity, x, t, t_next: x / 0, "24 of 24 values not finite"),
        (lambda velocity, x, t, t_next: x.double(), "got torch.float64, 0 of 24"),
    ],
)
def test_a_solver_that_returns_no_state_is_named_before_it_is_used(step, got):
    check_solver.cache_clear()
    with SOLVERS.temporarily(mine=step):
        with pytest.raises(ValueError, match=re.escape(got)) as error:
            check_solver("mine")
        assert str(error.value).startswith("sampler = 'mine': a step must return the next state")
    check_solver.cache_clear()
