"""Names of labellers and scorers, and the clients that speak for them.

``openai:NAME``     a chat model behind --base-url
``embedding:NAME``  an embeddings model there
``gguf:FILE``       a file that is served on loopback for as long as it is needed
``lexical, rule``   no model at all
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from moe_lens.autointerp.client import Client
from moe_lens.autointerp.transport import KEY_VARIABLE, NO_KEY, api_key, is_loopback, server_url
from moe_lens.errors import BadConfig, NoServer, nearest

LEXICAL, RULE = "lexical", "rule"
_MODELS = ("openai", "embedding", "gguf")
_LOCAL_SECONDS = 600.0
"""Least timeout for a local file: a CPU core reads some 80 tokens of a prompt a second."""
_LOCAL_TOKENS = 600
"""Longest reply of a local file, which may otherwise never end."""


@dataclass(frozen=True)
class Name:
    """``kind:model``; `model` is empty for the kinds without one."""

    kind: str
    model: str = ""

    def __str__(self) -> str:
        return (
            f"{self.kind}:{Path(self.model).name if self.kind == 'gguf' else self.model}" if self.model else self.kind
        )


def read_name(text: str, *, option: str, without_model: str) -> Name:
    """Read a value of ``--labeller`` or ``--scorer``.

    Args:
        without_model: the kind of that option that needs no model, ``lexical`` or ``rule``.

    Raises:
        BadConfig: it is none of the forms.
    """
    kinds = [kind for kind in _MODELS if option == "--scorer" or kind != "embedding"]
    kind, colon, model = text.strip().partition(":")
    if not colon and kind == without_model:
        return Name(kind)
    if kind in kinds and model.strip():
        return Name(kind, model.strip())
    forms = [without_model, *(f"{kind}:{'FILE' if kind == 'gguf' else 'MODEL'}" for kind in kinds)]
    hint = "" if kind in kinds else nearest(kind, [without_model, *kinds])
    raise BadConfig(f"{option} cannot be {text!r}{hint}: write {' or '.join(forms)}")


def check_name(name: Name, base_url: str | None) -> None:
    """Complain about a key that is missing or impossible, or a file that cannot be served; nobody is called.

    Raises:
        BadConfig: see the message.
    """
    if name.kind in ("openai", "embedding"):
        api_key(server_url(base_url))
    elif name.kind == "gguf":
        from moe_lens.autointerp.local import check_gguf

        check_gguf(name.model)


def served_model(base_url: str) -> str:
    """Name of the first model that the server at `base_url` lists.

    Raises:
        BadConfig: it does not answer, wants a key, or lists none.
    """
    import openai

    url = server_url(base_url)
    key = api_key(url)
    try:
        http = openai.DefaultHttpxClient(trust_env=False) if is_loopback(url) else None
        with openai.OpenAI(base_url=url, api_key=key or NO_KEY, max_retries=2, timeout=10, http_client=http) as sdk:
            names = [str(model.id) for model in sdk.models.list()]
    except openai.AuthenticationError:
        raise BadConfig(f"{url} wants another API key: set the environment variable {KEY_VARIABLE}") from None
    except openai.APIConnectionError:
        raise BadConfig(f"cannot reach {url}: start the server, or correct --base-url") from None
    except (openai.OpenAIError, ValueError, TypeError):
        names = []
    if not names:
        raise BadConfig(f"{url} lists no model: name one with --labeller openai:MODEL, or correct --base-url")
    return names[0]


class Clients:
    """One client per model, with one budget of calls and one cache; local servers stop with the context."""

    def __init__(
        self,
        *,
        base_url: str | None,
        cache: Path | None,
        max_calls: int | None = None,
        token_budget: int | None = None,
        reply_tokens: int | None = None,
        **rest: Any,
    ) -> None:
        self._base_url, self._cache = base_url, cache
        self._max_calls, self._token_budget = max_calls, token_budget
        self._settings: dict[str, Any] = rest | {"max_tokens": reply_tokens}
        self._clients: dict[str, Client] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def of(self, name: Name) -> Client:
        """The client of a model. Its budget is what the clients before it have left.

        Raises:
            BadConfig: a setting that cannot be used, or a file that cannot be served.
        """
        if str(name) not in self._clients:
            settings = dict(self._settings)
            if self._max_calls is not None:
                settings["max_calls"] = max(0, self._max_calls - self.spent["calls"])
            if self._token_budget is not None:
                used = self.spent["tokens_in"] + self.spent["tokens_out"]
                settings["token_budget"] = max(0, self._token_budget - used)
            model, url = name.model, self._base_url
            if name.kind == "gguf":
                from moe_lens.autointerp.local import serve

                server = serve(name.model)
                url, model = self._stack.enter_context(server), server.model
                settings["concurrency"] = server.parallel
                settings["timeout"] = max(settings["timeout"], _LOCAL_SECONDS)
                settings["max_tokens"] = settings["max_tokens"] or _LOCAL_TOKENS
            self._clients[str(name)] = Client(model, url, cache=self._cache, **settings)
        return self._clients[str(name)]

    @property
    def spent(self) -> dict[str, int]:
        """Calls made and tokens of them, in this process."""
        clients = self._clients.values()
        return {name: sum(getattr(client, name) for client in clients) for name in ("calls", "tokens_in", "tokens_out")}

    def check(self) -> None:
        """Complain about a model that has not answered a single request.

        Raises:
            NoServer: requests to it failed and none was answered.
        """
        for name, client in self._clients.items():
            found = client.counts
            if found["failed"] and not sum(n for outcome, n in found.items() if outcome not in ("failed", "budget")):
                causes = ", ".join(f"{n} {cause}" for cause, n in client.failures.most_common())
                raise NoServer(
                    f"{name} at {client.base_url} answered none of {found['failed']} requests ({causes}): see to the "
                    "server and run the same command again; nothing was replaced"
                )

    @property
    def failures(self) -> dict[str, int]:
        """Failed requests by cause over all models."""
        total: dict[str, int] = {}
        for client in self._clients.values():
            for cause, n in client.failures.items():
                total[cause] = total.get(cause, 0) + n
        return total

    @property
    def outcomes(self) -> dict[str, int]:
        """Requests by outcome over all models."""
        total: dict[str, int] = {}
        for client in self._clients.values():
            for outcome, n in client.counts.items():
                total[outcome] = total.get(outcome, 0) + n
        return total
