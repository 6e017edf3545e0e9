"""Train one model of the pair on one thread, resumably, with a warm-up / stable / decay schedule.

1. The order of training windows is a function of (seed, epoch), so MoE and twin see the same batches.
2. Loss = cross entropy + ``balance_weight`` * sum over layers of the Switch balance loss + ``z_weight`` * z.
3. A checkpoint (weights, optimizer, step) is written every ``checkpoint_tokens``; a killed run
   goes on from it and ends with the same weights as an uninterrupted one.
4. The last checkpoint before the decay is kept as ``stable.pt``: asking for more tokens later starts from
   there, goes on at the stable rate and decays again.

fp32 on purpose: at this width bf16 autocast halves the CPU's speed.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from moe_lens.errors import BadCorpus, BadOutput
from moe_lens.organisms.model import Architecture, Balance, build_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import OlmoeForCausalLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the weights, but for the data."""

    architecture: Architecture = field(default_factory=Architecture)
    tokens: int = 6_300_000
    batch_size: int = 4
    sequence_length: int = 256
    learning_rate: float = 3e-3
    final_rate: float = 0.05
    """Share of the learning rate left at the end."""
    warmup_steps: int = 60
    decay_share: float = 0.22
    """Of all steps, at the end."""
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    balance_weight: float = 0.005
    """Per layer."""
    z_weight: float = 0.001
    seed: int = 0
    checkpoint_tokens: int = 250_000
    log_tokens: int = 50_000

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def total_steps(self) -> int:
        return max(1, math.ceil(self.tokens / self.batch_tokens))

    @property
    def decay_start(self) -> int:
        """First step of the decay."""
        return self.total_steps - round(self.decay_share * self.total_steps)

    def rate(self, step: int) -> float:
        """Learning rate of ``step``: linear warm-up, constant, linear decay to ``final_rate``."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        if step < self.decay_start:
            return self.learning_rate * warm
        progress = (step - self.decay_start + 1) / (self.total_steps - self.decay_start)
        return self.learning_rate * warm * (1.0 - (1.0 - self.final_rate) * progress)


class Batches:
    """Windows of ``sequence_length + 1`` ids in an order that depends on the seed and the epoch only."""

    def __init__(self, ids: np.ndarray, batch_size: int, sequence_length: int, seed: int) -> None:
        self.ids, self.batch_size, self.length, self.seed = ids, batch_size, sequence_length, seed
        self.windows = (len(ids) - 1) // sequence_length
        self.per_epoch = self.windows // batch_size
        if self.per_epoch < 1:
            raise BadCorpus(f"{len(ids)} training tokens do not fill one batch of {batch_size} x {sequence_length}")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, step: int) -> Tensor:
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows)
        starts = self._order[index * self.batch_size : (index + 1) * self.batch_size] * self.length
        return torch.from_numpy(np.stack([self.ids[s : s + self.length + 1] for s in starts]).astype(np.int64))


def held_out_loss(model: OlmoeForCausalLM, windows: Tensor, batch: int = 8) -> float:
    """Mean cross entropy in nats per token over windows of ids."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for part in windows.split(batch):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            total += F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1), reduction="sum"
            ).item()
    model.train()
    return total / windows[:, 1:].numel()


class Trainer:
    """One run in one directory."""

    def __init__(self, config: TrainingConfig, ids: np.ndarray, out: Path, held_out: Tensor | None = None) -> None:
        self.config, self.out, self.held_out = config, out, held_out
        self.batches = Batches(ids, config.batch_size, config.sequence_length, config.seed)
        self.model = build_model(config.architecture, config.seed)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, config.beta2),
            fused=True,
        )
        self.balance = Balance(config.architecture.n_layers, config.architecture.n_experts)
        self.step = 0
        self.seconds = 0.0
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    # --- checkpoints ----------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run: all but the length and the logging."""
        skip = {"tokens", "checkpoint_tokens", "log_tokens", "decay_share"}
        return {k: v for k, v in asdict(self.config).items() if k not in skip} | {"windows": self.batches.windows}

    def save(self, name: str = "last.pt") -> None:
        state = {
            "identity": self._identity(),
            "step": self.step,
            "total_steps": self.config.total_steps,
            "decay_start": self.config.decay_start,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.out / f"{name}.partial"
        torch.save(state, temporary)
        temporary.replace(self.out / name)

    def _stored(self) -> dict[str, Any] | None:
        """The checkpoint to go on from: the last one, or the stable one when another length is asked for."""
        if not (self.out / "last.pt").exists():
            return None
        state = torch.load(self.out / "last.pt", weights_only=True)
        decaying = state["step"] > min(state["decay_start"], self.config.decay_start)
        if state["total_steps"] == self.config.total_steps or not decaying:
            return state
        log.info("%s: another length is asked for; going on from the stable checkpoint", self.out.name)
        stable = self.out / "stable.pt"
        state = torch.load(stable, weights_only=True) if stable.exists() else None
        if state is None or state["step"] > self.config.decay_start:
            raise BadOutput(
                f"{self.out} has gone past the point where {self.config.tokens} tokens would decay; "
                "ask for more tokens or remove it"
            )
        return state

    def _resume(self) -> None:
        state = self._stored()
        if state is None:
            return
        if state["identity"] != self._identity():
            raise BadOutput(
                f"{self.out} holds a checkpoint of another configuration or corpus; remove it or use another --work"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._trim_log()
        log.info("%s: resumed at step %d of %d", self.out.name, self.step, self.config.total_steps)

    def _trim_log(self) -> None:
        path = self.out / "log.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in kept))

    # --- steps ----------------------------------------------------------------------------------------

    def loss(self, window: Tensor) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        is_moe = config.architecture.n_experts > 1
        out = self.model.model(input_ids=window[:, :-1], use_cache=False, output_router_logits=is_moe)
        logits = self.model.lm_head(out.last_hidden_state)
        cross_entropy = F.cross_entropy(logits.view(-1, logits.shape[-1]), window[:, 1:].reshape(-1))
        if not is_moe:
            return cross_entropy, {"train": cross_entropy.item()}
        balance, z = self.balance.losses(out.router_logits, config.architecture.top_k)
        total = cross_entropy + config.balance_weight * balance + config.z_weight * z
        layers = config.architecture.n_layers
        return total, {"train": cross_entropy.item(), "balance": balance.item() / layers, "z": z.item() / layers}

    def train_step(self) -> dict[str, float]:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        loss, values = self.loss(self.batches[self.step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return values

    def _record(self, values: dict[str, float], sums: list[float]) -> None:
        row: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.config.batch_tokens,
            "seconds": round(self.seconds, 1),
            "rate": self.config.rate(self.step - 1),
            **values,
            "train": sum(sums) / len(sums),
        }
        if self.held_out is not None:
            row["held_out"] = held_out_loss(self.model, self.held_out)
        if self.config.architecture.n_experts > 1:
            load = self.balance.take_load()
            row |= {"load_min": load.min().item(), "load_max": load.max().item()}
        with (self.out / "log.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")
        log.info("%s %s", self.out.name, json.dumps(row))

    def run(self, *, until: int | None = None, on_checkpoint: Callable[[Trainer], None] | None = None) -> None:
        """Train to the end (or to step ``until``), writing checkpoints; ``on_checkpoint`` is called after each."""
        config = self.config
        every_log = max(1, config.log_tokens // config.batch_tokens)
        every_save = max(1, config.checkpoint_tokens // config.batch_tokens)
        last = min(config.total_steps, until or config.total_steps)
        sums: list[float] = []
        started, before = time.monotonic(), self.seconds
        while self.step < last:
            values = self.train_step()
            sums.append(values["train"])
            self.seconds = before + time.monotonic() - started
            if self.step % every_log == 0 or self.step == last:
                self._record(values, sums)
                sums = []
            if self.step == config.decay_start:
                self.save("stable.pt")
            if self.step % every_save == 0 or self.step == last:
                self.save()
                if on_checkpoint:
                    on_checkpoint(self)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.total_steps


def export(trainer: Trainer, tokenizer_dir: Path, out: Path) -> None:
    """Write an ordinary Hugging Face checkpoint: to a directory aside, then renamed over ``out``.

    Weights are stored in bf16 and loaded as float32: half the size to ship, and a CPU computes faster in float32.
    """
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

    fields = {k: v for k, v in trainer.model.config.to_dict().items() if not k.startswith("_")}
    with torch.device("meta"):
        copy = OlmoeForCausalLM(OlmoeConfig(**fields))
    state = {name: tensor.to(torch.bfloat16).clone() for name, tensor in trainer.model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    copy.tie_weights()
    copy.config.dtype = torch.bfloat16
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    copy.save_pretrained(temporary)
    config = temporary / "config.json"
    fields = {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (temporary / "model.safetensors").chmod(0o644)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(temporary)
    for extra in ("README.md", "card.json", "loss.svg"):
        if (out / extra).exists():
            shutil.copy2(out / extra, temporary / extra)
    previous = out.with_name(out.name + ".previous")
    shutil.rmtree(previous, ignore_errors=True)
    if out.exists():
        out.rename(previous)
    temporary.rename(out)
    shutil.rmtree(previous, ignore_errors=True)
