"""``python -m moe_lens.organisms fetch|corpus|tokenizer|train|export|evaluate|build``.

Each step reads what the step before wrote under ``--work`` and is skipped when its result is there; ``train``
goes on from its last checkpoint. ``build`` is all of them. Asking for more ``--tokens`` later continues the run.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

from moe_lens.errors import MoELensError, WriteFailed

log = logging.getLogger("moe_lens.organisms")

STEPS = ("fetch", "corpus", "tokenizer", "train", "export", "evaluate")
ROLES = {"moe": "tiny-moe", "dense": "tiny-dense"}
VOCAB_SIZE = 4096
# big buffers stay in the heap: without this every step maps, zeroes and unmaps them again (8 % of the time)
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe_lens.organisms", description=__doc__)
    parser.add_argument("step", choices=(*STEPS, "build"))
    parser.add_argument(
        "--work", type=Path, default=Path("~/.cache/moe-lens/organisms"), help="where everything is kept"
    )
    parser.add_argument("--out", type=Path, help="where checkpoints and probe set go (default: WORK/out)")
    parser.add_argument("--tokens", type=float, default=6.3e6, help="training tokens of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of each of the two trainings")
    parser.add_argument(
        "--export-tokens", type=float, default=0, help="also export every so many tokens; 0: only at the end"
    )
    parser.add_argument("--only", choices=tuple(ROLES), help="train: this model, in this process")
    return parser


def fetch(args: argparse.Namespace) -> None:
    from moe_lens.organisms.sources import fetch_all

    if not (args.work / "corpus/probe.jsonl").exists():
        fetch_all(args.work)


def corpus(args: argparse.Namespace) -> None:
    from moe_lens.organisms.corpus import build_corpus
    from moe_lens.organisms.sources import fetch_all

    if not (args.work / "corpus/probe.jsonl").exists():
        build_corpus(fetch_all(args.work), args.work / "corpus")


def tokenizer(args: argparse.Namespace) -> None:
    from moe_lens.organisms.corpus import read_jsonl
    from moe_lens.organisms.tokenizer import build_tokenizer

    if not (args.work / "tokenizer/packing.json").exists():
        build_tokenizer(read_jsonl(args.work / "corpus/train.jsonl"), args.work / "tokenizer", VOCAB_SIZE)


def _trainer(args: argparse.Namespace, role: str):
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from moe_lens.organisms.corpus import read_jsonl
    from moe_lens.organisms.model import Architecture
    from moe_lens.organisms.tokenizer import pack
    from moe_lens.organisms.training import Trainer, TrainingConfig

    torch.set_num_threads(args.threads)
    moe = Architecture(vocab_size=VOCAB_SIZE)
    config = TrainingConfig(
        architecture=moe if role == "moe" else moe.dense_twin(), tokens=int(args.tokens), seed=args.seed
    )
    ids = np.load(args.work / "tokenizer/train_ids.npy")
    row = pack(read_jsonl(args.work / "corpus/eval.jsonl"), AutoTokenizer.from_pretrained(args.work / "tokenizer"))
    length = config.sequence_length + 1
    starts = np.linspace(0, len(row) - length, 32).astype(int)
    held_out = torch.from_numpy(np.stack([row[s : s + length] for s in starts]).astype(np.int64))
    return Trainer(config, ids, args.work / "runs" / role, held_out)


def _train_one(args: argparse.Namespace) -> None:
    from moe_lens.organisms.training import Trainer, export

    exported = 0

    def maybe_export(trainer: Trainer) -> None:
        nonlocal exported
        tokens = trainer.step * trainer.config.batch_tokens
        if args.export_tokens and (exported == 0 or tokens - exported >= args.export_tokens):
            export(trainer, args.work / "tokenizer", args.out / ROLES[args.only])
            exported = tokens

    _trainer(args, args.only).run(on_checkpoint=maybe_export)


def train(args: argparse.Namespace) -> None:
    """Both models at once, each in its own process."""
    if args.only:
        _train_one(args)
        return
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(args.threads)}
    common = [
        "--work",
        args.work,
        "--out",
        args.out,
        "--tokens",
        args.tokens,
        "--seed",
        args.seed,
        "--threads",
        args.threads,
        "--export-tokens",
        args.export_tokens,
    ]
    runs = {
        role: subprocess.Popen(
            [sys.executable, "-m", "moe_lens.organisms", "train", "--only", role, *map(str, common)], env=environment
        )
        for role in ROLES
    }
    failed = [role for role, process in runs.items() if process.wait() != 0]
    if failed:
        raise WriteFailed(f"training of {', '.join(failed)} stopped; the same command goes on from the last checkpoint")


def export(args: argparse.Namespace) -> None:
    import shutil

    from moe_lens.organisms.corpus import read_jsonl
    from moe_lens.organisms.notice import write_notices
    from moe_lens.organisms.sources import fetch_all
    from moe_lens.organisms.training import export as export_checkpoint

    for role, name in ROLES.items():
        export_checkpoint(_trainer(args, role), args.work / "tokenizer", args.out / name)
    target = args.out / "corpus"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy2(args.work / "corpus/probe.jsonl", target / "probe.jsonl")
    probe, train = read_jsonl(args.work / "corpus/probe.jsonl"), read_jsonl(args.work / "corpus/train.jsonl")
    write_notices(probe, train, fetch_all(args.work), target)


def evaluate(args: argparse.Namespace) -> None:
    from moe_lens.organisms.card import write_cards
    from moe_lens.organisms.evaluate import evaluate_pair

    card = evaluate_pair(args.out, args.work, threads=args.threads)
    write_cards(card, args.out, args.work)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    args.work = args.work.expanduser().resolve()
    args.out = (args.out or args.work / "out").expanduser().resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for step in STEPS if args.step == "build" else (args.step,):
        log.info("step: %s", step)
        try:
            globals()[step](args)
        except MoELensError as problem:
            log.error("%s", problem)
            return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
