"""The length of a run in epochs, as tokens."""

from __future__ import annotations

from llmtrain.config.duration import Duration
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError


def epochs_in_tokens(cfg: RunConfig) -> Duration:
    """``train.duration`` of so many epochs of the one source that ``cfg`` trains on, in tokens.

    An epoch is every sample of the source once. Whole steps, rounded down, at least one: no sample
    is seen once more than asked for. Raises ConfigError where there is no such source, DataError
    where it cannot be opened.
    """
    # Only now: a config without epochs is read without numeric libraries.
    from llmtrain.data.catalogue import open_catalogue
    from llmtrain.data.packing import samples_in

    data, wanted = cfg.data, cfg.train.duration
    names = [name for name, weight in data.weights.items() if weight > 0]
    if len(names) != 1 or data.phases or data.replay is not None:
        what = f"a mixture ({', '.join(names)})" if len(names) > 1 else "data.weights of no source"
        what = "data.phases" if data.phases else what
        what = "data.replay" if data.replay is not None else what
        raise ConfigError(
            f"train.duration: {wanted} needs one source, whose epochs these are, and this run has "
            f"{what}; write steps or tokens (`llmtrain data plan` prints the epochs of each source)"
        )
    if data.select is not None:
        raise ConfigError(
            f"train.duration: {wanted} is of all samples, and data.select takes some of them; "
            "write steps or tokens"
        )
    catalogue = open_catalogue(cfg)
    catalogue.require(names)
    samples = samples_in(catalogue.open_train(names[0]).num_tokens, data.seq_len)
    if samples == 0:
        raise ConfigError(f"train.duration: {names[0]} has no tokens to train on")
    steps = max(1, int(wanted.value * samples // cfg.train.global_batch_size))
    return Duration.parse(f"{steps * cfg.train.global_batch_size * data.seq_len}tok")
