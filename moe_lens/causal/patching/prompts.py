"""Two prompts as a pair: their tokens, which positions correspond, and the two next tokens that tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from moe_lens.errors import BadConfig, BadCorpus, OutOfRange

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from moe_lens.models.lens import Lens

    Prompt = str | Sequence[int]
    Token = str | int
    Positions = Literal["all", "last"] | Sequence[int | tuple[int, int]]


@dataclass(frozen=True)
class Pair:
    """The clean and the corrupt prompt with the positions at which experts are patched."""

    clean: tuple[int, ...]
    """Token ids."""
    corrupt: tuple[int, ...]
    chosen: tuple[tuple[int, int], ...]
    """Positions that the user chose, (clean, corrupt)."""

    @property
    def shared_start(self) -> int:
        """Tokens at the start that are the same in both, where a causal model computes the same."""
        same = [a == b for a, b in zip(self.clean, self.corrupt, strict=False)]
        return same.index(False) if False in same else len(same)

    @property
    def patched(self) -> tuple[tuple[int, int], ...]:
        """Chosen positions at which the two prompts can differ."""
        return tuple((a, b) for a, b in self.chosen if a != b or a >= self.shared_start)

    def ids(self, which: str) -> tuple[int, ...]:
        return self.clean if which == "clean" else self.corrupt

    def source_of(self, base: str) -> dict[int, int]:
        """Position in the other prompt of each patched position of `base`."""
        return dict(self.patched) if base == "clean" else {b: a for a, b in self.patched}


def pair_of(lens: Lens, clean: Prompt, corrupt: Prompt, positions: Positions, routing: str) -> Pair:
    """Tokenise two prompts and say which positions correspond.

    Raises:
        BadCorpus: a prompt without tokens.
        OutOfRange: a prompt longer than the context, or a position that a prompt does not have.
        BadConfig: prompts of the same tokens, of unequal length where that cannot be aligned, positions at which
            they cannot differ.
    """
    a, b = read_prompt(lens, clean, "clean"), read_prompt(lens, corrupt, "corrupt")
    if a == b:
        raise BadConfig("clean and corrupt are the same tokens, so there is nothing to patch: change one of them")
    if routing == "frozen" and len(a) != len(b):
        raise BadConfig(
            f"clean has {len(a)} tokens and corrupt {len(b)}: frozen routing compares position by position, so give "
            "prompts of equal length or use routing='live'"
        )
    pair = Pair(a, b, _chosen(positions, len(a), len(b)))
    if not pair.patched:
        raise BadConfig(
            f"clean and corrupt share their first {pair.shared_start} tokens, so experts write the same at the chosen "
            f"positions: choose some from {pair.shared_start} on"
        )
    return pair


def read_prompt(lens: Lens, prompt: Prompt, name: str) -> tuple[int, ...]:
    """Token ids of a text, special tokens of the tokenizer included, or the ids that were given."""
    if isinstance(prompt, str):
        if lens.tokenizer is None:
            raise BadConfig("this lens has no tokenizer: give token ids, or make it as Lens(model, tokenizer)")
        ids = tuple(int(i) for i in lens.tokenizer(prompt, verbose=False)["input_ids"])
    else:
        ids = _ids(prompt, name)
    if not ids:
        raise BadCorpus(f"{name} has no tokens: give at least one character")
    limit = lens.spec.max_positions
    if limit is not None and len(ids) > limit:
        raise OutOfRange(f"{name} has {len(ids)} tokens and the context holds {limit}: give a shorter prompt")
    if max(ids) >= (n := lens.model.config.get_text_config().vocab_size) or min(ids) < 0:
        raise OutOfRange(f"{name} holds a token id outside the vocabulary: ids are 0 to {n - 1}")
    return ids


def _ids(prompt: Any, name: str) -> tuple[int, ...]:
    if isinstance(prompt, Iterable):
        listed = [x.item() if hasattr(x, "item") else x for x in prompt]
        if all(isinstance(x, int) and not isinstance(x, bool) for x in listed):
            return tuple(listed)
    raise BadConfig(f"{name} is a text or a list of token ids, not {type(prompt).__name__}")


def _chosen(positions: Positions, n_clean: int, n_corrupt: int) -> tuple[tuple[int, int], ...]:
    if isinstance(positions, str):
        if positions == "last":
            return ((n_clean - 1, n_corrupt - 1),)
        if positions != "all":
            raise BadConfig(f"unknown positions {positions!r}: use all, last, or a list of numbers")
        if n_clean != n_corrupt:
            raise BadConfig(
                f"clean has {n_clean} tokens and corrupt {n_corrupt}, so their positions do not correspond: give "
                "prompts of equal length, or positions= as 'last' or as pairs (in clean, in corrupt)"
            )
        return tuple((i, i) for i in range(n_clean))
    found = [_position(entry, n_clean, n_corrupt) for entry in positions]
    if not found:
        raise BadConfig("positions= is empty: give 'all', 'last' or at least one position")
    for side, name in ((0, "clean"), (1, "corrupt")):
        used = [pair[side] for pair in dict.fromkeys(found)]
        if len(set(used)) < len(used):
            raise BadConfig(f"positions= names one position of {name} in two pairs: pair each position once")
    return tuple(sorted(set(found)))


def _position(entry: Any, n_clean: int, n_corrupt: int) -> tuple[int, int]:
    given = entry if isinstance(entry, (tuple, list)) else (entry, entry)
    if len(given) != 2 or not all(isinstance(i, int) for i in given):
        raise BadConfig(f"positions= holds numbers or pairs (in clean, in corrupt), not {entry!r}")
    for at, n, name in zip(given, (n_clean, n_corrupt), ("clean", "corrupt"), strict=True):
        if not -n <= at < n:
            raise OutOfRange(f"{name} has no position {at}: its positions are 0 to {n - 1}")
    return given[0] % n_clean, given[1] % n_corrupt


def contrast_of(
    lens: Lens,
    clean: Float[Tensor, "vocab"],
    corrupt: Float[Tensor, "vocab"],
    target: Token | None,
    foil: Token | None,
) -> tuple[int, int]:
    """Token ids (target, foil); what is not given is the most likely next token of clean, and of corrupt.

    Raises:
        OutOfRange: a text that is not one token, or an id outside the vocabulary.
        BadConfig: the same token twice, also by default.
    """
    is_open = target is None and foil is None
    first = int(clean.argmax()) if target is None else read_token(lens, target, len(clean))
    if foil is not None:
        second = read_token(lens, foil, len(clean))
    else:
        among = corrupt.clone()
        if not is_open:
            among[first] = -torch.inf
        second = int(among.argmax())
    if first == second:
        why = "is the most likely next token of both prompts" if is_open else "is both target and foil"
        raise BadConfig(f"{name_of(lens, first)!r} {why}: give target= and foil= as two tokens")
    return first, second


def read_token(lens: Lens, token: Token, vocabulary: int) -> int:
    """The id of a text that is one token, or the id itself."""
    if isinstance(token, str):
        if lens.tokenizer is None:
            raise BadConfig("this lens has no tokenizer: give target= and foil= as token ids")
        ids = lens.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise OutOfRange(f"{token!r} is {len(ids)} tokens: give a text that is one token, or a token id")
        token = int(ids[0])
    if not isinstance(token, int) or not 0 <= token < vocabulary:
        raise OutOfRange(f"there is no token id {token}: ids are 0 to {vocabulary - 1}")
    return token


def name_of(lens: Lens, token: int) -> str:
    """The token as text, its id without a tokenizer."""
    return str(token) if lens.tokenizer is None else str(lens.tokenizer.decode([token]))
