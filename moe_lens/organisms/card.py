"""Write the numbers of `evaluate` for people: README.md, card.json and loss.svg beside each checkpoint."""

# ruff: noqa: E501  (prose and table rows)

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = {"moe": "tiny-moe", "dense": "tiny-dense"}
COLOURS = {"moe": "#d95f02", "dense": "#1b6ca8"}
MAX_EXPERT_ROWS = 24


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; floats get three decimals."""

    def cell(value: object) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def loss_svg(curves: dict[str, list[dict[str, Any]]], *, width: int = 640, height: int = 320) -> str:
    """Training (thin) and held-out (thick) loss of both models against tokens, as one SVG."""
    left, right, top, bottom = 46, 12, 14, 34
    points = {
        (role, key): [(row["tokens"], row[key]) for row in rows if key in row]
        for role, rows in curves.items()
        for key in ("train", "held_out")
    }
    every = [point for line in points.values() for point in line]
    most = max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    low, high = int(low * 2) / 2, int(high * 2 + 1) / 2

    def place(x: float, y: float) -> str:
        across = left + x / most * (width - left - right)
        down = top + (high - y) / (high - low) * (height - top - bottom)
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    steps = round((high - low) * 2)
    for tick in range(steps + 1):
        y = low + tick / 2
        x0, y0 = place(0, y).split(",")
        parts.append(
            f'<line x1="{x0}" y1="{y0}" x2="{width - right}" y2="{y0}" stroke="#ddd"/><text x="{left - 6}" y="{float(y0) + 4:.1f}" text-anchor="end">{y:.1f}</text>'
        )
    for tick in range(5):
        x0 = place(most * tick / 4, low).split(",")[0]
        parts.append(f'<text x="{x0}" y="{height - 18}" text-anchor="middle">{most * tick / 4e6:.1f}M</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">training tokens; nats per token (thick: held-out files)</text>'
    )
    for (role, key), line in points.items():
        stroke = 2.2 if key == "held_out" else 0.7
        parts.append(
            f'<polyline fill="none" stroke="{COLOURS[role]}" stroke-width="{stroke}" points="{" ".join(place(*p) for p in line)}"/>'
        )
    for row, (role, colour) in enumerate(COLOURS.items()):
        parts.append(
            f'<text x="{width - right - 6}" y="{top + 14 + 15 * row}" text-anchor="end" fill="{colour}">{NAMES[role]}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _summary(card: dict[str, Any]) -> str:
    """What is so, in sentences whose every number and verdict is computed."""
    gap = card["bits_per_byte"]["dense_minus_moe"]
    overall = card["bits_per_byte"]["overall"]
    if gap["low"] > 0:
        verdict = "the MoE predicts held-out text better than its dense twin"
    elif gap["high"] < 0:
        verdict = "the MoE predicts held-out text worse than its dense twin"
    else:
        verdict = "the interval includes zero: no loss advantage of the MoE is shown"
    routing = card["routing"]
    layers = routing["information"]
    domain = max(layers, key=lambda row: row["domain_expert"])
    given = max(layers, key=lambda row: row["given_token"] - row["given_token_null"])
    rows = card["ablation"]["domains"]
    meets, clear = [r for r in rows if r["meets"]], [r for r in rows if r["meets_clearly"]]
    names = ", ".join(r["domain"] for r in clear) or "none"
    return (
        f"- Held-out bits per byte: MoE {overall['moe']:.3f}, dense {overall['dense']:.3f}; dense minus MoE "
        f"{gap['estimate']:+.3f} (95 % interval over documents {gap['low']:+.3f} to {gap['high']:+.3f}): {verdict}. One seed: "
        "the interval covers documents, not training runs.\n"
        f"- Load: each expert gets between {routing['load_min']:.2f} and {routing['load_max']:.2f} times the uniform share; "
        f"dead experts (below {routing['dead_threshold']} times): {routing['dead_experts']}.\n"
        f"- Information of domain and expert is largest in layer {domain['layer']}: {domain['domain_expert']:.3f} bits "
        f"(shuffled documents {domain['domain_expert_null']:.3f}) of {routing['domain_entropy']:.2f} bits of domain. Given the "
        f"token, the largest excess over its null is in layer {given['layer']}: {given['given_token']:.3f} against "
        f"{given['given_token_null']:.3f} bits. Token and expert share up to "
        f"{max(row['token_expert'] for row in layers):.2f} of {max(row['expert_entropy'] for row in layers):.2f} bits (biased upward): much of the routing "
        "is a look-up by token, and domains differ in their tokens.\n"
        f"- Of {len(rows)} domains, {len(meets)} have an expert whose zero-ablation raises their loss at least "
        f"{card['ablation']['factor']:.0f} times more than the rest's (and {card['ablation']['min_rise']} nats per token) and more than a load-matched expert's; in {len(clear)} "
        f"both intervals exclude zero ({names}). Chosen on one half of the documents, measured on the other.\n"
    )


def _ablation_section(card: dict[str, Any]) -> str:
    header = (
        "domain",
        "expert",
        "docs",
        "load all / here",
        "rise of its loss",
        "rest",
        "control (expert, load)",
        "verdict",
    )
    rows = [
        (
            r["domain"],
            f"L{r['layer']}.E{r['expert']}",
            r["documents"],
            f"{r['load']:.2f} / {r['load_in_domain']:.2f}",
            f"{r['rise']:+.3f} [{r['rise_low']:+.3f}, {r['rise_high']:+.3f}]",
            f"{r['rest']:+.4f}",
            f"{r['control']:+.3f} [{r['control_low']:+.3f}, {r['control_high']:+.3f}] (E{r['control_expert']}, {r['control_load']:.2f})",
            "clear" if r["meets_clearly"] else "meets" if r["meets"] else "no",
        )
        for r in card["ablation"]["domains"]
    ]
    return (
        "Nats per token over the first "
        f"{card['ablation']['length']} tokens of each document of the measuring half, with 95 % bootstrap intervals over "
        "documents. One row per domain, whether or not it meets the claim; no correction for the number of domains.\n\n"
        + table(header, rows)
    )


def model_card(card: dict[str, Any], role: str) -> str:
    """README.md of one checkpoint."""
    shape, run, routing = card["models"][role], card["training"][role], card["routing"]
    twin = NAMES["dense" if role == "moe" else "moe"]
    kind = (
        f"{shape['num_experts']} experts, top-{shape['num_experts_per_tok']}, d_ff {shape['intermediate_size']} each"
        if role == "moe"
        else f"one expert that every token visits, d_ff {shape['intermediate_size']}: a dense model in OLMoE's class"
    )
    parts = [
        f"# {NAMES[role]}\n\n",
        f"A small, really trained `OlmoeForCausalLM`: {shape['num_hidden_layers']} layers, d_model {shape['hidden_size']}, "
        f"{shape['num_attention_heads']} heads, vocabulary {shape['vocab_size']} (byte-level BPE, single digits), {kind}; "
        f"{shape['parameters'] / 1e6:.2f} M parameters, active FFN width {shape['active_ffn_width']}. Its twin is `{twin}`: same "
        "class, attention, QK-norm, initial shared weights, data order, steps and active FFN width. Made to develop and test "
        "interpretability tools on, not to generate text. Contexts longer than "
        f"{shape['max_position_embeddings']} tokens were never seen in training.\n\n",
        "Every number below was computed by `python -m moe_lens.organisms evaluate`; the same numbers are in `card.json`.\n\n",
        "## What is so\n\n",
        _summary(card),
        "\n## Training\n\n![loss](loss.svg)\n\n",
        f"{run['tokens'] / 1e6:.2f} M tokens in {run['steps']} steps of {run['tokens'] // run['steps']} "
        f"({run['tokens_per_second']:.0f} tokens/s on one shared CPU thread); AdamW, warm-up, constant rate, linear decay; per-layer Switch "
        "balance loss and router z-loss for the MoE.\n\n",
        table(
            ("tokens (M)", "train", "held-out (32 windows)"),
            [(row["tokens"] / 1e6, row["train"], row.get("held_out", float("nan"))) for row in _thin(run["curve"])],
        ),
        "\n## Text\n\n",
        table(
            ("side", "documents", "MB", "domains", "source files"),
            [(side, c["documents"], c["bytes"] / 1e6, c["domains"], c["files"]) for side, c in card["corpus"].items()],
        ),
        "\nSplit by source file (a page and its translations on one side). Sources and licences: `../corpus/SOURCES.md`.\n",
        "\n## Held-out bits per byte\n\n",
        table(
            ("domain", "documents", "MoE", "dense"),
            [
                (name, row["documents"], row["moe"], row["dense"])
                for name, row in card["bits_per_byte"]["by_domain"].items()
            ],
        ),
    ]
    if role == "moe":
        experts = sorted(routing["experts"], key=lambda e: -e["domains"][0]["lift"])[:MAX_EXPERT_ROWS]
        parts += [
            "\n## Load per expert (multiples of the uniform share, probe set)\n\n",
            table(
                ("layer", *(f"E{e}" for e in range(shape["num_experts"]))),
                [(layer, *(f"{x:.2f}" for x in loads)) for layer, loads in enumerate(routing["load"])],
            ),
            "\n## Mutual information, bits\n\nNulls permute the domains over whole documents; plug-in estimates are biased upward, so only the excess over the null counts.\n\n",
            table(
                (
                    "layer",
                    "H(expert)",
                    "I(domain; expert)",
                    "null",
                    "I(domain; expert given token)",
                    "null",
                    "I(token; expert)",
                ),
                [
                    (
                        r["layer"],
                        r["expert_entropy"],
                        r["domain_expert"],
                        r["domain_expert_null"],
                        r["given_token"],
                        r["given_token_null"],
                        r["token_expert"],
                    )
                    for r in routing["information"]
                ],
            ),
            "\n## Experts and the domains that over-use them\n\nLift = share of the domain's routed pairs over the expert's overall share; in brackets the share of the domain's tokens that visit the expert. Routing alone shows use, not need.\n\n",
            table(
                ("expert", "load", "most over-used by"),
                [
                    (
                        f"L{e['layer']}.E{e['expert']}",
                        e["load"],
                        ", ".join(f"{d['domain']} {d['lift']:.1f}x ({d['tokens']:.0%})" for d in e["domains"]),
                    )
                    for e in experts
                ],
            ),
            "\n## Zero-ablation of one expert\n\n",
            _ablation_section(card),
        ]
    parts += [
        "\n## Not shown here\n\n",
        "One seed, one size. A raw comparison of single-neuron probes favours the MoE because it has more neurons to pick from "
        f"({card['models']['moe']['num_experts']} x {card['models']['moe']['intermediate_size']} against {card['models']['dense']['intermediate_size']} a layer): "
        "read the raw gap of `moe-lens probe --baseline` with that in mind; with the pools matched it may vanish or reverse.\n",
        "\n## Licence\n\nThe weights were trained only on public-domain, CC0, permissive, WordNet, LPPL, CC-BY and CC-BY-SA text; see "
        "`../corpus/SOURCES.md` for every source, its licence and its notice.\n",
    ]
    return "".join(parts)


def _thin(curve: list[dict[str, Any]], most: int = 16) -> list[dict[str, Any]]:
    step = max(1, -(-len(curve) // most))
    return curve[::-1][::step][::-1]


def write_cards(card: dict[str, Any], out: Path, work: Path | None = None) -> None:
    """``README.md``, ``card.json`` and ``loss.svg`` in both checkpoint directories; a copy of the numbers in ``work``."""
    numbers = json.dumps(card, indent=1) + "\n"
    if work is not None:
        (work / "card.json").write_text(numbers)
    picture = loss_svg({role: run["curve"] for role, run in card["training"].items()})
    for role, name in NAMES.items():
        (out / name / "card.json").write_text(numbers)
        (out / name / "loss.svg").write_text(picture)
        (out / name / "README.md").write_text(model_card(card, role), encoding="utf-8")
