"""Time of parts of a program inside a training step: of calls, in the forward and in the backward pass.

A watched function's arguments and results pass through an identity that notes the moment at which their gradient passes: the backward of
a call begins with the first gradient of its results and ends with the last one of its arguments. On a GPU the moments are events
(``bench_timing.Clock``): nothing waits, and kernels follow each other as in a run that is not timed. A function that is compiled is
watched from outside, so its graph does not change. What activation checkpointing computes again counts as forward once more.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from bench_timing import Clock, Moment


class _Mark(torch.autograd.Function):
    """Identity that calls back when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, callback: Callable[[], None]) -> torch.Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.callback()
        return grad, None


def _marked(value: Any, callback: Callable[[], None]) -> Any:
    """``value`` with every tensor in it that has a gradient marked; tuples, lists and dataclasses are looked into."""
    if isinstance(value, torch.Tensor):
        return _Mark.apply(value, callback) if value.requires_grad else value
    if isinstance(value, tuple | list):
        inner = [_marked(item, callback) for item in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return replace(value, **{name: _marked(getattr(value, name), callback) for name in names})
    return value


@dataclass
class _Span:
    """Of one call's forward or backward."""

    part: str
    begin: Moment | None = None
    end: Moment | None = None


class Stopwatch:
    """Seconds of each part, summed since the last ``take``."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._spans: list[_Span] = []

    def take(self) -> dict[str, float]:
        """Waits for the device."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = defaultdict(float)
        for span in spans:
            if span.begin is not None and span.end is not None:
                seconds[span.part] += self.clock.seconds(span.begin, span.end)
        return seconds

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Add the seconds of ``owner.name``'s calls, forward and backward, to ``part``."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            forward, backward = _Span(part), _Span(part)
            self._spans += [forward, backward]

            def gradient_arrives() -> None:
                if backward.begin is None:
                    backward.begin = self.clock.now()

            def gradient_leaves() -> None:
                backward.end = self.clock.now()

            forward.begin = self.clock.now()
            args, kwargs = self._with_gradient(args), dict(kwargs)
            result = function(*_marked(args, gradient_leaves), **kwargs)
            forward.end = self.clock.now()
            return _marked(result, gradient_arrives)

        setattr(owner, name, timed)

    @staticmethod
    def _with_gradient(args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The first argument gets a gradient where none has one: the backward of an input of the model would have no end."""
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if any(a.requires_grad for a in tensors) or not torch.is_grad_enabled():
            return args
        if not tensors or args[0] is not tensors[0] or not args[0].is_floating_point():
            return args
        return (args[0].detach().requires_grad_(), *args[1:])

    def watch_call(self, owner: Any, name: str, part: str) -> None:
        """Add the seconds of a method's calls, which record no gradients, to ``part``."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            span = _Span(part, self.clock.now())
            result = method(*args, **kwargs)
            span.end = self.clock.now()
            self._spans.append(span)
            return result

        setattr(owner, name, timed)
