"""One line to an OpenAI-compatible server, spoken by the ``openai`` package: a question in, a reply or an error out.

No text of the package's own errors goes further than this file, because servers quote keys in them.
"""

from __future__ import annotations

import asyncio
import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np

from moe_lens.autointerp.cache import Stored
from moe_lens.autointerp.replies import Outcome, ReplySchema
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    import openai
    from jaxtyping import Float
    from numpy import ndarray

Messages = Sequence[dict[str, str]]

KEY_VARIABLE = "OPENAI_API_KEY"
URL_VARIABLE = "OPENAI_BASE_URL"
OPENAI = "https://api.openai.com/v1"
NO_KEY = "no-key"  # the package insists on one, local servers do not read it
_CONNECT_SECONDS = 10
_FIRST_RETRIES = 2  # few, so that a wrong address is noticed in seconds
_NOT_CONNECTED = ("ConnectError", "ConnectTimeout", "UnsupportedProtocol")  # of httpx, whose major versions differ
_NO_CREDIT = "insufficient_quota"
_FILTERED = "content_filter"

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class NoReply(Exception):
    """A call that ended without a reply; the text says how, and quotes nobody."""


class NotOpenAI(Exception):
    """An answer that no OpenAI-compatible server gives."""


def server_url(url: str | None) -> str:
    """`url`, or that of the environment, or OpenAI's.

    Raises:
        BadConfig: it is no http address, or it carries a password or a query, which would end up in logs.
    """
    url = url or os.environ.get(URL_VARIABLE) or OPENAI
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = parts = None
    if parts and (parts.username is not None or parts.query or parts.fragment):
        raise BadConfig(f"--base-url must not hold a password or a query: put the key into {KEY_VARIABLE}")
    if not usable:
        raise BadConfig(f"cannot use the address {url!r}: give --base-url as http://localhost:8000/v1")
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether the server runs on this machine; a proxy of the environment could not reach it."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def api_key(url: str) -> str:
    """The key of the environment, empty for a server that may need none.

    Raises:
        BadConfig: OpenAI is asked without a key, or the key holds characters that no key has.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and url == OPENAI:
        raise BadConfig(
            f"there is no API key for {url}: set the environment variable {KEY_VARIABLE}, "
            "or give the address of another server with --base-url"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise BadConfig(f"{KEY_VARIABLE} holds characters that no API key has: set it again, to the key alone")
    return key


@dataclass
class Known:
    """What calls have taught about a server and a model; it outlives the lines to them."""

    greeted: bool = False  # a first call was made, and showed no wrong setting
    unsupported: set[str] = field(default_factory=set)  # settings that were turned down


class Line(ABC, Generic[Question, Answer]):
    """Connections to one server, and the locks that tasks of one event loop share."""

    def __init__(
        self,
        model: str,
        url: str,
        *,
        parameters: dict[str, Any],
        concurrency: int,
        timeout: float,
        max_retries: int,
        known: Known,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.gate = asyncio.Semaphore(concurrency)
        self.busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._model, self._url, self._parameters, self._known = model, url, parameters, known
        self._timeout, self._max_retries = timeout, max_retries
        self._first = asyncio.Lock()
        self._stopped: BadConfig | None = None
        self._key = ""

    @cached_property
    def _sdk(self) -> openai.AsyncOpenAI:
        """Made at the first call: requests that are all in the cache need no key and no ``openai`` import."""
        import openai

        self._key = api_key(self._url)
        return openai.AsyncOpenAI(
            api_key=self._key or NO_KEY,
            base_url=self._url,
            max_retries=self._max_retries,
            timeout=openai.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS)),
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if is_loopback(self._url) else None,
        )

    async def close(self) -> None:
        """Close the connections."""
        if "_sdk" in vars(self):
            await self._sdk.close()

    @abstractmethod
    async def _ask(self, sdk: openai.AsyncOpenAI, question: Question, without: set[str]) -> Answer:
        """One call, the settings `without` left out. Raises NotOpenAI for an answer of another form."""

    def _spare(self, named: str, without: set[str]) -> str | None:
        """The next setting to leave out of a question that was turned down; the server complained of `named`."""
        return None

    async def send(self, question: Question) -> Answer:
        """The server's reply. The first call goes alone; when it shows a wrong setting, no other is made.

        Raises:
            BadConfig: wrong key, address or model, or no credit.
            NoReply: no reply after all repetitions, or the server turned this request down.
        """
        if not self._known.greeted:
            async with self._first:
                if not self._known.greeted and not self._stopped:
                    return await self._greet(question)
        if self._stopped:
            raise self._stopped
        return await self._exchange(question, first=False)

    async def _greet(self, question: Question) -> Answer:
        """The first call, of which only a wrong setting keeps the others back."""
        try:
            reply = await self._exchange(question, first=True)
        except NoReply:
            self._known.greeted = True
            raise
        self._known.greeted = True
        return reply

    async def _exchange(self, question: Question, *, first: bool) -> Answer:
        """One call, repeated with fewer settings as long as the server turns some down."""
        without = set(self._known.unsupported)
        while True:
            answer = await self._once(question, without, first=first)
            if not isinstance(answer, Exception):
                self._known.unsupported |= without
                return answer
            if (setting := self._turned_down(answer, without)) is None:
                break
            without.add(setting)
        if self._stopped is None and (sentence := self._reason_to_stop(answer, first=first)):
            self._stopped = BadConfig(sentence)
        if self._stopped:
            raise self._stopped
        raise NoReply(_in_words(answer))

    async def _once(self, question: Question, without: set[str], *, first: bool) -> Answer | Exception:
        """A reply or the error. Errors are returned: one raised from here would drag the package's text along."""
        import openai

        sdk = self._sdk.with_options(max_retries=min(self._max_retries, _FIRST_RETRIES)) if first else self._sdk
        try:
            return await self._ask(sdk, question, without)
        except (openai.OpenAIError, NotOpenAI, ValueError) as error:  # ValueError: a body that is not JSON, or no UTF-8
            return error

    def _clean(self, text: str) -> str:
        """`text` without the key, should a server quote it, and without half surrogate pairs, which no file takes."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text

    def _turned_down(self, error: Exception, without: set[str]) -> str | None:
        """The setting to leave out at the next try, None if that would not help."""
        if _status(error) not in (400, 422):
            return None
        return self._spare(str(getattr(error, "param", None)), without)

    def _reason_to_stop(self, error: Exception, *, first: bool) -> str | None:
        """The sentence that ends the run, None if only this request failed."""
        status = _status(error)
        if status == 401 or (first and status == 403):
            problem = "refused the API key" if self._key else "wants an API key"
            return f"{self._url} {problem}: set the environment variable {KEY_VARIABLE} to a key of that server"
        if status == 402 or getattr(error, "code", None) == _NO_CREDIT:
            return f"the account at {self._url} has no credit left: top it up and run again; stored replies are kept"
        if not first:
            return None
        if type(error.__cause__).__name__ in _NOT_CONNECTED:
            return f"cannot reach {self._url}: start the server, or correct --base-url"
        if status in (404, 405) or isinstance(error, NotOpenAI | json.JSONDecodeError):
            return (
                f"{self._url} has no model {self._model!r} or does not speak OpenAI's protocol: "
                "correct the model's name or --base-url, which mostly ends in /v1"
            )
        if status in (400, 422):
            said = " ".join(self._clean(str(getattr(error, "message", ""))).split())[:200]
            return f"{self._url} turned the first request for the model {self._model!r} down, correct it: {said}"
        return None


class ChatLine(Line[tuple[Messages, ReplySchema], Stored]):
    """Chat completions. A question that is turned down is asked without what the server complained of, or else
    without structured output."""

    async def _ask(self, sdk: openai.AsyncOpenAI, question: tuple[Messages, ReplySchema], without: set[str]) -> Stored:
        import openai

        try:
            completion = await sdk.chat.completions.create(**self._body(*question, without))
        except openai.BadRequestError as error:
            if error.code != _FILTERED:
                raise
            return Stored(Outcome.REFUSED, "", 0, 0)
        choices = getattr(completion, "choices", None)
        if not isinstance(choices, list):
            raise NotOpenAI("no list of choices")
        return self._reply(choices, getattr(completion, "usage", None))

    def _body(self, messages: Messages, schema: ReplySchema, without: set[str]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "messages": list(messages)}
        body |= {name: value for name, value in self._parameters.items() if name not in without}
        if "response_format" not in without:
            # as it is: the package would walk through the whole schema at every call, which takes milliseconds
            return body | {"extra_body": {"response_format": schema.response_format}}
        *before, last = messages
        asked = {**last, "content": f"{last['content']}\n\n{schema.instructions}"}
        return body | {"messages": [*before, asked]}

    def _reply(self, choices: list[Any], usage: Any) -> Stored:
        """Outcome ``ok`` here means that there is text to read."""
        choice = choices[0] if choices else None
        message = getattr(choice, "message", None)
        content, refusal = getattr(message, "content", None), getattr(message, "refusal", None)
        filtered = getattr(choice, "finish_reason", None) == _FILTERED
        text = self._clean(content if isinstance(content, str) else "")
        cost = (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))
        if refusal or filtered:
            return Stored(Outcome.REFUSED, self._clean(str(refusal or text)), *cost)
        return Stored(Outcome.OK if text.strip() else Outcome.EMPTY, text, *cost)

    def _spare(self, named: str, without: set[str]) -> str | None:
        if named in self._parameters and named not in without:  # reasoning models take no temperature
            return named
        return None if "response_format" in without else "response_format"


class Embedded(NamedTuple):
    """The vectors of several texts, in their order, and the tokens that the server counted."""

    vectors: Float[ndarray, "text dimension"]
    tokens_in: int


class EmbeddingLine(Line[Sequence[str], Embedded]):
    """Embeddings, several texts a call. The parameters of a line are those of chats; none of them is sent."""

    async def _ask(self, sdk: openai.AsyncOpenAI, question: Sequence[str], without: set[str]) -> Embedded:
        # float: some servers know no base64, which the package asks for by default
        answer = await sdk.embeddings.create(model=self._model, input=list(question), encoding_format="float")
        data = getattr(answer, "data", None)
        if not isinstance(data, list):
            raise NotOpenAI("no list of data")
        return Embedded(_vectors(data, len(question)), _count(getattr(answer, "usage", None), "prompt_tokens"))


def _vectors(data: list[Any], n_texts: int) -> Float[ndarray, "text dimension"]:
    """Vectors in the order of the texts.

    Raises:
        NoReply: not one vector for each text, of one length, finite and not zero.
    """
    found = {getattr(one, "index", None): getattr(one, "embedding", None) for one in data}
    if len(data) != n_texts or found.keys() != set(range(n_texts)):
        raise NoReply(f"{len(data)} embeddings for {n_texts} texts")
    try:
        vectors = np.array([found[i] for i in range(n_texts)], np.float32)
    except (TypeError, ValueError):
        raise NoReply("embeddings that are not vectors of one length") from None
    if vectors.ndim != 2 or not np.isfinite(vectors).all() or not vectors.any(1).all():
        raise NoReply("embeddings without a direction")
    return vectors


def _count(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else 0


def _status(error: Exception) -> int | None:
    return getattr(error, "status_code", None)


def _in_words(error: Exception) -> str:
    if status := _status(error):
        return f"HTTP {status}"
    if isinstance(error, NotOpenAI | json.JSONDecodeError):
        return "the answer is not that of an OpenAI-compatible server"
    return type(error).__name__  # such as APITimeoutError, APIConnectionError
