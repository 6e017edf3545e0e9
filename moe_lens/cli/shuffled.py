"""Labels that the labeller of a run makes of shuffled activations, kept in its directory for `moe-lens validate`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from moe_lens.errors import BadConfig
from moe_lens.types import Status

if TYPE_CHECKING:
    import pandas as pd

    from moe_lens.cli.validate import OnTrial
    from moe_lens.config import ValidateConfig
    from moe_lens.corpus.text import Corpus
    from moe_lens.models.lens import Lens

TABLE = "labels_shuffled"
_KEY = "made_of"
"""Column that says what the table was made of."""


def shuffled(settings: ValidateConfig, on_trial: OnTrial, lens: Lens, text: Corpus) -> pd.DataFrame:
    """A false label for every expert with a true one, read back if an earlier trial made them.

    Raises:
        BadConfig: labels that no labeller of ours wrote.
        BadOutput: the directory is another run's, or has no exemplars.
    """
    from moe_lens.autointerp.captured import captured_of, captured_settings
    from moe_lens.autointerp.endpoint import LEXICAL, Clients
    from moe_lens.autointerp.labels import with_none
    from moe_lens.autointerp.pipeline import REPLIES
    from moe_lens.autointerp.shuffled import shuffled_labels
    from moe_lens.capture.run import create_run, digest, identity_of

    assert settings.output is not None
    if settings.labels is not None:
        raise BadConfig("a file's labels cannot be made anew of shuffled activations: leave shuffled out of --nulls")
    run = create_run(settings.output, identity_of(lens, text, seed=settings.seed))
    labeller = str(on_trial.labels["labeller"].iloc[0])
    experts = sorted(set(on_trial.labels[["layer", "expert"]].itertuples(index=False, name=None)))
    captured = captured_settings(run)
    made_of = digest([labeller, settings.seed, experts, None if captured is None else captured.to_dict()])
    if run.has(TABLE):
        kept = with_none(run.frame(TABLE))
        if (kept.pop(_KEY) == made_of).all():
            return kept
    cache = run.path / REPLIES
    clients = nullcontext(None) if labeller == LEXICAL else Clients(base_url=settings.base_url, cache=cache)
    with clients as asked:
        found = shuffled_labels(
            captured_of(run, text, lens.tokenizer),
            experts=experts,
            labeller=labeller,
            clients=asked,
            seed=settings.seed,
        )
    if not found["status"].isin([str(Status.FAILED), str(Status.NOT_RUN)]).any():  # else ask again next time
        run.write(TABLE, found.assign(**{_KEY: made_of}))
    return found
