"""The protocol of arXiv 2604.02178 as a plain loop, an oracle for ``probing.herbst2026``, and texts for both."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import regex
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.model_selection import train_test_split

from moe_lens.corpus.concepts import Concept, Regex, concept
from moe_lens.corpus.text import Corpus, Document
from moe_lens.models.lens import Lens

DIGIT = concept("digit", category="text", regex=r"\d")
CAPITAL_RUN = concept("capital_run", category="code", regex=r"[A-E]{2,}")
CONCEPTS = (DIGIT, CAPITAL_RUN)


def long_texts(n: int = 60, seed: int = 0) -> Corpus:
    """Texts of 40 to 520 letters, digits and blanks: some shorter, some longer than the source's 300 characters."""
    r = np.random.default_rng(seed)
    letters = list("abcdeABCDE0123  ")
    texts = ["".join(r.choice(letters, int(r.integers(40, 520)))) for _ in range(n)]
    return Corpus.of([Document(f"d{i}", text) for i, text in enumerate(texts)], id="long")


@dataclass
class Reference:
    """The protocol as the source has it: two forward passes a text and concept, one cell and one fit at a time."""

    lens: Lens
    corpus: Corpus
    num_tokens: int
    batch_size: int = 1
    seed: int = 42
    solver: str = "newton-cholesky"

    def table(self, concepts: tuple[Concept, ...], ks: tuple[int, ...]) -> pd.DataFrame:
        rows: list[dict[str, Any]] = []
        for one in concepts:
            for (layer, expert), (x, y) in self.features(self.batches(one)).items():
                for scored in self.probes(x, y, ks):
                    rows.append({"concept": one.name, "layer": layer, "expert": expert, **scored})
        return pd.DataFrame(rows).sort_values(["concept", "layer", "expert", "k"], ignore_index=True)

    def copies(self, one: Concept) -> Iterator[tuple[list[int], list[bool], int]]:
        assert isinstance(one.labeller, Regex)
        pattern, rng = one.labeller.pattern, random.Random(self.seed)
        for document in self.corpus.documents:
            text = document.text[-300:] if one.category == "code" else document.text[:300]
            marked = [False] * len(text)
            for match in regex.finditer(pattern, text):
                marked[match.start() : match.end()] = [True] * (match.end() - match.start())
            coded = self.lens.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            mask = [any(marked[a:b]) for a, b in coded["offset_mapping"]]
            if not any(mask):
                continue
            yield coded["input_ids"], mask, 1
            others = [i for i, hit in enumerate(mask) if not hit]
            drawn = set(rng.sample(others, min(sum(mask), len(others))))
            yield coded["input_ids"], [i in drawn for i in range(len(mask))], 0

    def batches(self, one: Concept) -> list[list[tuple[list[int], list[bool], int]]]:
        done, now, total = [], [], 0
        for copy in self.copies(one):
            now.append(copy)
            total += sum(copy[1])
            if len(now) == self.batch_size:
                done.append(now)
                now = []
                if total >= self.num_tokens:
                    return done
        return [*done, now] if now else done

    def features(self, batches: list[Any]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        found: dict[tuple[int, int], list[tuple[np.ndarray, int]]] = {}
        for batch in batches:
            visits: list[tuple[Any, ...]] = []
            for copy, (ids, mask, label) in enumerate(batch):
                for layer, slot, expert, position, h in self.visits(ids):
                    if mask[position]:
                        visits.append((layer, expert, slot, copy, position, (h, label)))
            for layer, expert, _, _, _, row in sorted(visits, key=lambda v: v[:5]):
                found.setdefault((layer, expert), []).append(row)
        return {at: (np.stack([h for h, _ in rows]), np.array([y for _, y in rows])) for at, rows in found.items()}

    def visits(self, ids: list[int]) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
        """(layer, slot, expert, position, h) of every token, recomputed from what the experts are given."""
        seen: list[tuple[Any, ...]] = []
        layers = self.lens.model.model.layers
        modules = [layer.mlp.experts if self.lens.spec.is_moe else layer.mlp.down_proj for layer in layers]
        hooks = [m.register_forward_pre_hook(lambda _, a, i=i: seen.append((i, *a))) for i, m in enumerate(modules)]
        with torch.no_grad():
            self.lens.model(torch.tensor([ids]))
            for hook in hooks:
                hook.remove()
            for layer, hidden, *chosen in seen:
                hidden = hidden.reshape(-1, hidden.shape[-1])
                if not chosen:
                    yield from ((layer, 0, 0, t, hidden[t].float().numpy()) for t in range(len(hidden)))
                    continue
                experts = modules[layer]
                for slot in range(chosen[0].shape[1]):
                    for t, expert in enumerate(chosen[0][:, slot].tolist()):
                        gate, up = (experts.gate_up_proj[expert] @ hidden[t]).chunk(2)
                        yield layer, slot, expert, t, (experts.act_fn(gate) * up).float().numpy()

    def probes(self, x: np.ndarray, y: np.ndarray, ks: tuple[int, ...]) -> list[dict[str, Any]]:
        counts = {"num_positive": int(y.sum()), "num_negative": int((1 - y).sum())}
        if min(counts.values()) < 50:
            return [{"k": k, **counts, "f1": np.nan, "recall": np.nan, "precision": np.nan, "neurons": []} for k in ks]
        split: Any = train_test_split(x, y, test_size=0.25, random_state=self.seed, stratify=y)
        x_train, x_test, y_train, y_test = split
        ranked = np.abs(x_train[y_train == 1].mean(0) - x_train[y_train == 0].mean(0)).argsort()[::-1]
        out = []
        for k in ks:
            columns = ranked[:k]
            limits: dict[str, Any] = {"max_iter": 500} if self.solver == "saga" else {"tol": 1e-10, "max_iter": 500}
            model = LogisticRegression(solver=self.solver, class_weight="balanced", random_state=self.seed, **limits)
            precise = np.float32 if self.solver == "saga" else np.float64  # Newton's line search needs the digits
            model.fit(x_train[:, columns].astype(precise), y_train)
            says = model.predict(x_test[:, columns])
            p, r, f1, _ = precision_recall_fscore_support(y_test, says, average="binary", zero_division=np.nan)  # type: ignore[arg-type]
            out.append({"k": k, **counts, "f1": f1, "recall": r, "precision": p, "neurons": columns.tolist()})
        return out


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that reference and subject share, of cells that saw a token."""
    columns = ["concept", "layer", "expert", "k", "num_positive", "num_negative", "f1", "recall", "precision"]
    seen = table[table["num_positive"] + table["num_negative"] > 0]
    return seen[columns].sort_values(columns[:4]).reset_index(drop=True)
