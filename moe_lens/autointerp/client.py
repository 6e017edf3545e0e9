"""Questions to a language model behind any OpenAI-compatible server: many at once, none paid twice, none lost.

    client = Client("openai:NAME", "http://localhost:8000/v1", cache=run / "replies.sqlite")
    replies = client.ask_all([Request(messages, ReplySchema.answers(range(1, 21)))], describe="detection")

What happens to one request
 1. A reply in the cache is taken from there. Else a call is made, if ``max_calls`` leaves one.
 2. The ``openai`` package repeats a call that met 429, 5xx, a timeout or a closed connection (``max_retries``).
    What still has no reply then is ``failed``; it is not cached, so that the next run asks again.
 3. A reply that cannot be used is asked for once more, with the reason. Then the request abstains.
The first call of all goes alone: a wrong key, address or model ends the run there, with one sentence; a server
without structured output says so there too, and is from then on asked in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from base64 import b64decode, b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from moe_lens.autointerp.cache import ReplyCache, Stored, request_key
from moe_lens.autointerp.replies import Outcome, Parsed, ReplySchema
from moe_lens.autointerp.transport import ChatLine, EmbeddingLine, Known, Messages, NoReply, api_key, server_url
from moe_lens.errors import BadConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

T = TypeVar("T")
L = TypeVar("L", ChatLine, EmbeddingLine)

_ASK_AGAIN = {Outcome.INVALID, Outcome.EMPTY, Outcome.TOO_FEW_ANSWERS, Outcome.TOO_MANY_ANSWERS}
_BYTES_PER_TOKEN = 4
_TOKENS_PER_MESSAGE = 4
TEXTS_PER_CALL = 64
_QUOTED = 2000  # characters of an unusable reply that go back with the second question


class Request(NamedTuple):
    """Chat messages (``role`` and ``content``) and the reply that is asked for."""

    messages: Messages
    schema: ReplySchema


@dataclass(frozen=True)
class Reply:
    """What came of one request. ``value`` is the schema's shape if and only if ``status`` is ok.

    ``tokens_in`` and ``tokens_out`` are the server's own counts over both calls of a request that was asked again,
    0 where it gives none. ``cached``: nothing was sent. ``why`` says in a few words what was wrong.
    """

    status: Outcome
    value: Any = None
    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    cached: bool = False
    why: str = ""

    @property
    def counted_as(self) -> Outcome:
        """``cached`` for a usable reply from the cache. A cached abstention stays what it is."""
        return Outcome.CACHED if self.cached and self.status is Outcome.OK else self.status


class Prediction(NamedTuple):
    """Cost of requests that are not in the cache, if each is answered at once. Second questions come on top."""

    calls: int
    tokens_in: int


class Embedding(NamedTuple):
    """A text's vector, if and only if `status` is ok. ``cached``: nothing was sent."""

    status: Outcome
    vector: Float[ndarray, "dimension"] | None = None
    cached: bool = False


class Client:
    """One model behind one server. The API key is read from ``OPENAI_API_KEY`` when the first call is made.

    Args:
        model: ``NAME`` or ``openai:NAME``.
        base_url: such as ``http://localhost:8000/v1``; None is ``OPENAI_BASE_URL``, or OpenAI itself. It is no part
            of a cached reply's key: a model must go by the same name on two servers only if it is the same.
        cache: sqlite file of replies, None to keep none.
        concurrency: requests on their way at a time.
        max_calls: calls to make at most (second questions count, the package's repetitions do not), None for any.
        token_budget: tokens of prompts and replies, by the server's count, after which no call is made; what is on
            its way then comes on top. None for any.
        timeout: seconds to wait for one reply.
        temperature: 0 for the likeliest reply.
        max_tokens: limit on one reply, None for the server's own. A model that turns either of the two down is asked
            without it.
        max_retries: repetitions of a call that met 429, 5xx, a timeout or a closed connection.

    Raises:
        BadConfig: a setting that cannot be used.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        cache: Path | None,
        concurrency: int = 16,
        max_calls: int | None = None,
        token_budget: int | None = None,
        timeout: float = 60,
        temperature: float = 0.0,
        max_tokens: int | None = None,
        max_retries: int = 5,
    ) -> None:
        self.model = model.removeprefix("openai:").strip()
        if not self.model:
            raise BadConfig(f"{model!r} names no model: write it as openai:NAME")
        if concurrency < 1 or timeout <= 0 or (max_tokens is not None and max_tokens < 1):
            raise BadConfig("concurrency, timeout and max_tokens must be above 0")
        if max_retries < 0 or temperature < 0 or (max_calls is not None and max_calls < 0):
            raise BadConfig("max_calls, max_retries and temperature must be 0 or more")
        self.base_url, self.token_budget = server_url(base_url), token_budget
        self.concurrency, self.max_calls, self.timeout, self.max_retries = concurrency, max_calls, timeout, max_retries
        self.parameters = {"temperature": temperature} | ({} if max_tokens is None else {"max_tokens": max_tokens})
        self.calls = self.tokens_in = self.tokens_out = 0
        self._outcomes: Counter[Outcome] = Counter()
        self.failures: Counter[str] = Counter()
        """Failed requests by what went wrong, such as ``HTTP 500`` or ``APITimeoutError``."""
        self._cache = None if cache is None else ReplyCache(cache)
        self._known: defaultdict[type, Known] = defaultdict(Known)
        self._lines: dict[type, Any] = {}

    @property
    def counts(self) -> dict[str, int]:
        """Requests by outcome, all outcomes named; they add up to the requests asked so far.

        ``calls``, ``tokens_in`` and ``tokens_out`` beside it are what these requests cost in this process.
        """
        return {outcome.value: self._outcomes[outcome] for outcome in Outcome}

    def check(self) -> None:
        """Complain about a missing or impossible API key without calling anybody.

        Raises:
            BadConfig: OpenAI itself is asked without a key, or the key holds characters that no key has.
        """
        api_key(self.base_url)

    def predict(self, requests: Sequence[Request]) -> Prediction:
        """Calls and input tokens that `requests` will cost, those in the cache left out. Calls nobody, needs no key.

        A token is taken to be 4 bytes of UTF-8, plus 4 tokens a message. That is near for English prose; code and
        other scripts have up to twice as many tokens. The reply's length is not predicted.
        """
        missing = [request for request in requests if not self._stored(self._key(*request, 0))]
        missing = missing[: None if self.max_calls is None else max(0, self.max_calls - self.calls)]
        sizes = [len(m["content"].encode("utf-8", "replace")) for request in missing for m in request.messages]
        return Prediction(len(missing), sum(math.ceil(n / _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE for n in sizes))

    def ask_all(self, requests: Sequence[Request], *, progress: bool = True, describe: str = "ask") -> list[Reply]:
        """Replies in the order of `requests`. Works in a notebook too, whose own event loop is already running.

        Raises:
            BadConfig: a wrong key, address or model, no credit. Replies that were there by then are in the cache.
            BadOutput: the cache cannot be read.
            WriteFailed: the cache cannot be written.
        """
        return self._run(lambda: self._together([self.ask(*request) for request in requests], progress, describe))

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `work` in an event loop; in a thread of its own where one is running in this one."""
        if not _loop_is_running():
            return asyncio.run(work())
        loop = asyncio.new_event_loop()
        task = loop.create_task(work())
        with ThreadPoolExecutor(1) as pool:
            try:
                return pool.submit(loop.run_until_complete, task).result()
            except KeyboardInterrupt:  # the notebook's stop button
                loop.call_soon_threadsafe(task.cancel)
                raise
            finally:
                pool.submit(loop.close)

    async def _together(self, work: Sequence[Coroutine[Any, Any, T]], progress: bool, describe: str) -> list[T]:
        """What all of `work` returns, in its order; after an error, the rest of it is given up."""
        from tqdm.auto import tqdm

        tasks = [asyncio.ensure_future(one) for one in work]
        try:
            with tqdm(total=len(tasks), desc=describe, unit="request", disable=None if progress else True) as bar:
                for done in asyncio.as_completed(tasks):
                    await done
                    bar.update()
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.aclose()

    async def ask(self, messages: Messages, schema: ReplySchema) -> Reply:
        """One request, from inside an event loop; raises as ``ask_all``. ``aclose`` at the end and after an error."""
        line = self._line(ChatLine)
        async with line.gate:
            reply = await self._call(line, messages, schema, attempt=0)
            if reply.status in _ASK_AGAIN:
                again = await self._call(line, _once_more(messages, reply), schema, attempt=1)
                reply = replace(
                    again,
                    tokens_in=reply.tokens_in + again.tokens_in,
                    tokens_out=reply.tokens_out + again.tokens_out,
                    cached=reply.cached and again.cached,
                )
        self._outcomes[reply.counted_as] += 1
        if reply.status is Outcome.FAILED:
            self.failures[reply.why] += 1
        return reply

    def predict_embeddings(self, texts: Sequence[str]) -> Prediction:
        """As ``predict``, for ``embed_all``."""
        missing = [text for text in dict.fromkeys(texts) if not self._stored(self._embedding_key(text))]
        calls = -(-len(missing) // TEXTS_PER_CALL)
        left = calls if self.max_calls is None else min(calls, max(0, self.max_calls - self.calls))
        sizes = [math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN) for text in missing]
        return Prediction(left, sum(sizes[: left * TEXTS_PER_CALL]))

    def embed_all(
        self, texts: Sequence[str], *, progress: bool = True, describe: str = "embed"
    ) -> dict[str, Embedding]:
        """The embedding of every text; several texts go into one call, and each is cached by itself.

        A call that ended without a reply, or with fewer vectors than texts, leaves its texts failed and uncached.

        Raises: as ``ask_all``.
        """
        found = {text: self._stored_embedding(text) for text in texts}
        missing = [text for text, embedding in found.items() if embedding is None]
        parts = [missing[at : at + TEXTS_PER_CALL] for at in range(0, len(missing), TEXTS_PER_CALL)]
        for part in self._run(lambda: self._together([self._embed(part) for part in parts], progress, describe)):
            found |= part
        done = {text: embedding for text, embedding in found.items() if embedding is not None}
        self._outcomes.update(Outcome.CACHED if one.cached else one.status for one in done.values())
        return done

    async def _embed(self, texts: Sequence[str]) -> dict[str, Embedding]:
        line = self._line(EmbeddingLine)
        async with line.gate:
            if self._spent:
                return dict.fromkeys(texts, Embedding(Outcome.BUDGET))
            self.calls += 1
            try:
                vectors, tokens_in = await line.send(texts)
            except NoReply as problem:
                self.failures[str(problem)] += len(texts)
                return dict.fromkeys(texts, Embedding(Outcome.FAILED))
            self.tokens_in += tokens_in
            if self._cache is not None:
                stored = [
                    Stored(Outcome.OK, b64encode(vector.astype("<f4").tobytes()).decode(), 0, 0) for vector in vectors
                ]
                self._cache.put_all(dict(zip(map(self._embedding_key, texts), stored, strict=True)))
            return {text: Embedding(Outcome.OK, vector) for text, vector in zip(texts, vectors, strict=True)}

    def _stored_embedding(self, text: str) -> Embedding | None:
        stored = self._stored(self._embedding_key(text))
        vector = stored and np.frombuffer(b64decode(stored.text), "<f4")
        return None if vector is None else Embedding(Outcome.OK, vector, cached=True)

    def _embedding_key(self, text: str) -> str:
        return request_key(model=self.model, embedding_of=text)

    async def aclose(self) -> None:
        """Close the connections and the cache; the next request opens them again."""
        lines, self._lines = self._lines, {}
        for line in lines.values():
            if line.loop is asyncio.get_running_loop():
                await line.close()
        if self._cache is not None:
            self._cache.close()

    def _line(self, kind: type[L]) -> L:
        """The line of this kind that belongs to the running event loop."""
        line = self._lines.get(kind)
        if line is None or line.loop is not asyncio.get_running_loop():
            line = self._lines[kind] = kind(
                self.model,
                self.base_url,
                parameters=self.parameters,
                concurrency=self.concurrency,
                timeout=self.timeout,
                max_retries=self.max_retries,
                known=self._known[kind],
            )
        return line

    def _key(self, messages: Messages, schema: ReplySchema, attempt: int) -> str:
        return request_key(
            model=self.model,
            messages=list(messages),
            parameters=self.parameters,
            schema=schema.identity,
            attempt=attempt,
        )

    @property
    def _spent(self) -> bool:
        n_tokens = self.tokens_in + self.tokens_out
        return (self.max_calls is not None and self.calls >= self.max_calls) or (
            self.token_budget is not None and n_tokens >= self.token_budget
        )

    def _stored(self, key: str) -> Stored | None:
        return None if self._cache is None else self._cache.get(key)

    async def _call(self, line: ChatLine, messages: Messages, schema: ReplySchema, attempt: int) -> Reply:
        """One call, or its reply from the cache."""
        key = self._key(messages, schema, attempt)
        # of two tasks with the same request, the second finds the reply of the first
        async with contextlib.nullcontext() if self._cache is None else line.busy[key]:
            if stored := self._stored(key):
                return _read(stored, schema, cached=True)
            if self._spent:
                return Reply(Outcome.BUDGET, why="the budget of calls or tokens is spent")
            self.calls += 1
            try:
                stored = await line.send((messages, schema))
            except NoReply as problem:
                return Reply(Outcome.FAILED, why=str(problem))
            # nothing is awaited between the reply and its place in the cache
            self.tokens_in += stored.tokens_in
            self.tokens_out += stored.tokens_out
            reply = _read(stored, schema, cached=False)
            if self._cache is not None:
                self._cache.put(key, stored._replace(outcome=reply.status))
            return reply


def _read(stored: Stored, schema: ReplySchema, *, cached: bool) -> Reply:
    """A stored reply, its text read anew."""
    refused = stored.outcome is Outcome.REFUSED
    outcome, value, why = Parsed(Outcome.REFUSED, why="the model refused") if refused else schema.parse(stored.text)
    return Reply(outcome, value, stored.text, stored.tokens_in, stored.tokens_out, cached, why)


def _once_more(messages: Messages, reply: Reply) -> Messages:
    """The question again, with the reply and what was wrong with it. After an empty reply, the question alone."""
    if reply.status is Outcome.EMPTY:
        return messages
    wrong = f"That answer cannot be used: {reply.why}. Answer the question again, in the form that was asked for."
    said = {"role": "assistant", "content": reply.text[:_QUOTED]}
    return [*messages, said, {"role": "user", "content": wrong}]


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
