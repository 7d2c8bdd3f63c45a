"""Gradients of several micro-batches: reduced after each or once, they are the same, and so many collectives are sent."""

import pytest
import torch
import torch.distributed as dist

from symbiotic_titan.parallel import dry_run
from symbiotic_titan.parallel.fsdp import reduce_after
from tests.helpers.debug_model import backward, build, config_of, forward
from tests.helpers.gloo import run_on_ranks

MICRO_BATCHES = 3
EXPERT_PARALLEL = "--parallelism.expert_parallel_degree 2"
HYBRID = "--parallelism.data_parallel_replicate_degree 2"
CASES = {
    2: {"fsdp": "", "expert_parallel": EXPERT_PARALLEL},
    4: {"hybrid": HYBRID, "hybrid_expert_parallel": f"{HYBRID} {EXPERT_PARALLEL}"},
}
# torch 2.13 has a new name for the collective that FSDP calls.
SCATTER = "reduce_scatter_single" if hasattr(dist, "all_gather_single") else "reduce_scatter_tensor"


def gradients(model, args, rank, gradient_sync):
    """(those of a step by name, bytes scattered, bytes summed over replicas). ``gradient_sync``: None leaves FSDP as it is, which
    reduces everything after every micro-batch."""
    sent = {SCATTER: 0, "all_reduce": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, original in [(name, getattr(dist, name)) for name in sent]:

            def counted(*tensors, of=name, original=original, **options):
                given = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor)]
                sent[of] += max(tensor.nbytes for tensor in given)
                return original(*tensors, **options)

            patch.setattr(dist, name, counted)
        model.zero_grad()
        for i in range(MICRO_BATCHES):
            if gradient_sync is not None:
                is_last = i == MICRO_BATCHES - 1
                reduce_after(model, is_last=is_last, gradient_sync=gradient_sync)
            backward(forward(model, args, rank + 10 * i))
            held = sum(p.grad is not None for p in model.parameters())
            if gradient_sync == "last" and not is_last:
                assert held == 0  # no shard is complete
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return found, sent[SCATTER], sent["all_reduce"]


def on_rank(rank, cases):
    results = {}
    for case, overrides in cases.items():
        config = config_of(overrides)
        model, args = build(config)
        found = {sync: gradients(model, args, rank, sync) for sync in (None, "always", "last")}
        once = sum(
            dry_run.traffic_by_stage(
                dry_run.sharded_parameters(model), dry_run.Precision.of(config), "default"
            ).values(),
            dry_run.Traffic(),
        )
        results[case] = found, once
    return results


@pytest.mark.parametrize("num_ranks", CASES)
def test_gradients_reduced_after_the_last_micro_batch_are_those_reduced_after_each(num_ranks):
    for result in run_on_ranks(num_ranks, on_rank, CASES[num_ranks]):
        for case, (found, once) in result.items():
            reference, scattered, summed = found[None]
            for sync, scatters in (("always", MICRO_BATCHES), ("last", 1)):
                gradients_of, *sent = found[sync]
                for name, gradient in reference.items():
                    limit = 1e-5 * float(gradient.abs().max())
                    torch.testing.assert_close(
                        gradients_of[name], gradient, rtol=1e-4, atol=limit, msg=f"{case} {name}"
                    )
                # All of it, and the share that the sums over replicas are.
                assert sent == [scattered * scatters // MICRO_BATCHES, summed // MICRO_BATCHES]
                planned = once.of_step(MICRO_BATCHES, sync)
                assert planned.reduce_scatter == once.reduce_scatter * scatters
                assert planned.all_reduce == once.all_reduce
            assert scattered > 0 and (summed > 0) == ("hybrid" in case)
