"""What a state is tied to besides the shards: the mixture and all that decides which documents a sample becomes."""

import json

import pytest

from symbiotic_titan.data.fingerprint import (
    check_fingerprint,
    fingerprint_of,
)


@pytest.fixture
def sources(demo_config):
    def change(number, **settings):
        rows = [{**vars(s)} for s in demo_config.sources]
        rows[number] |= settings
        return {"sources": rows}

    return change


@pytest.mark.parametrize(
    "data, message",
    [
        ({"mixture_by": "tokens"}, "data.mixture_by was samples, now it is tokens"),
        ({"vit_pixels": 256}, "data.vit_pixels was 1024, now it is 256"),
        ({"vit_min_pixels": 256}, "data.vit_min_pixels was 0, now it is 256"),
        ({"vae_pixels": 256}, "data.vae_pixels was 1024, now it is 256"),
        ({"max_aspect": 3.0}, "data.max_aspect was 2.0, now it is 3.0"),
        ({"condition_dropout": 0.2}, "data.condition_dropout was 0.1, now it is 0.2"),
        ({"max_row_share": {"lm": 0.5}}, "data.max_row_share was {}, now it is {'lm': 0.5}"),
    ],
)
def test_other_documents_or_another_mixture_are_refused(make_loader, data, message):
    with pytest.raises(ValueError) as error:
        make_loader(data).load_state_dict(make_loader().state_dict())
    assert message in str(error.value)
    assert "samples would be lost, repeated or changed" in str(error.value)


def test_other_keys_or_another_task_of_a_source_are_refused(make_loader, sources):
    state = make_loader(sources(0, keys={"caption": "caption"})).state_dict()
    with pytest.raises(
        ValueError, match="the keys of source 't2i' was {'caption': 'caption'}, now it is {}"
    ):
        make_loader().load_state_dict(state)
    with pytest.raises(ValueError, match="the task of source 't2i' was t2i, now it is t2i_long"):
        make_loader(sources(0, task="t2i_long")).load_state_dict(make_loader().state_dict())


def test_samples_may_be_truncated_from_now_on_but_not_no_longer(make_loader, sources):
    """To cut or to skip is the remedy for a sample that stopped the run as too long."""
    make_loader({"too_long": "truncate"}).load_state_dict(make_loader().state_dict())
    make_loader({"too_long": "skip"}).load_state_dict(make_loader().state_dict())
    state = make_loader(sources(3, too_long="truncate")).state_dict()
    make_loader({"too_long": "truncate"}).load_state_dict(state)
    with pytest.raises(
        ValueError, match="too_long of source 'mmu' was 'truncate', now it is 'skip'"
    ):
        make_loader({"too_long": "skip"}).load_state_dict(state)


def test_what_only_arranges_rows_or_handles_bad_samples_may_change(make_loader):
    settings = {
        "packing": "fullest", "lookahead": 3, "bad_samples": "skip", "max_image_pixels": 10**6,
        "max_vit_tokens": 100, "at_end": "stop",
    }  # fmt: skip
    loader, changed = make_loader(), make_loader(settings)
    next(iter(loader))
    changed.load_state_dict(loader.state_dict())
    assert changed.state_dict() == loader.state_dict()


def test_a_state_of_an_older_version_is_one_by_samples_and_fits_else(make_loader):
    current = fingerprint_of(make_loader().spec)
    old = {
        key: current[key]
        for key in (
            "data.seed",
            "data.num_lanes",
            "training.seq_len",
            "sources",
            "weights",
            "files",
        )
    }
    check_fingerprint(old, current)
    check_fingerprint(json.loads(json.dumps(current)), current)
    with pytest.raises(ValueError, match="data.mixture_by was samples, now it is tokens"):
        check_fingerprint(old, fingerprint_of(make_loader({"mixture_by": "tokens"}).spec))


def test_streams_of_an_older_state_go_on(make_loader):
    loader = make_loader()
    next(iter(loader))
    saved = json.loads(loader.state_dict()["state"])
    for stream in saved["lanes"].values():
        del stream["tokens"], stream["ended"]
    after = make_loader()
    after.load_state_dict({"state": json.dumps(saved)})
    assert (next(iter(after)).tokens == next(iter(loader)).tokens).all()
